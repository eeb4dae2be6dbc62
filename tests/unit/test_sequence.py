from tests.unit.harness_gateway import make_request
from workers.gateway.sequence import Phase, Sequence
from workers.types import FinishReason, Output, Stopping, TokenLogprob


def admitted(request, index=0):
    sequence = Sequence(request, index, order=0)
    sequence.state_block, sequence.kv_blocks = 7, [3, 4]
    return sequence


def scores(tokens):
    return [TokenLogprob(token, -1.0) for token in tokens]


def test_a_sequence_waits_prefills_decodes_and_finishes():
    sequence = Sequence(make_request(prompt=(1, 2, 3), max_tokens=2), 0, order=0)
    assert sequence.phase is Phase.WAITING

    sequence.state_block = 0
    assert sequence.phase is Phase.PREFILLING
    chunk = sequence.segment(2)
    assert (chunk.token_ids, chunk.start, chunk.num_logits) == ((1, 2), 0, 0)
    assert not sequence.samples(chunk)
    assert sequence.commit(chunk, [], None) is None

    rest = sequence.segment(1)
    assert (rest.token_ids, rest.start, rest.num_logits) == ((3,), 2, 1)
    assert sequence.samples(rest)
    assert sequence.commit(rest, [], 9) is None
    assert sequence.phase is Phase.DECODING
    assert sequence.commit(sequence.segment(1), [], 8) is FinishReason.LENGTH

    sequence.finish = FinishReason.LENGTH
    assert sequence.phase is Phase.FINISHED


def test_prompt_tokens_are_scored_once_across_chunks_and_recomputation():
    sequence = admitted(make_request(prompt=(1, 2, 3, 4, 5), output=Output(prompt_logprobs=0)))
    first = sequence.segment(3)
    assert first.num_logits == 3
    assert sequence.scored_tokens(first) == [2, 3, 4]
    sequence.commit(first, scores([2, 3, 4]), None)

    sequence.computed = 0  # preempted
    again = sequence.segment(2)
    assert (again.num_logits, sequence.scored_tokens(again)) == (0, [])
    sequence.commit(again, [], None)
    last = sequence.segment(3)

    assert last.num_logits == 2  # the row of token 4 scores 5, that of token 5 is sampled
    assert sequence.scored_tokens(last) == [5]
    sequence.commit(last, scores([5]), 6)
    assert [s and s.token_id for s in sequence.prompt_logprobs] == [None, 2, 3, 4, 5]
    assert sequence.segment(1).num_logits == 1


def test_only_the_first_sequence_scores_the_prompt_and_only_for_a_new_client():
    asked = Output(prompt_logprobs=0)

    assert admitted(make_request(output=asked, num_sequences=2), 1).prompt_logprobs is None
    assert admitted(make_request(output=asked, emitted=((4,),))).prompt_logprobs is None


def test_tokens_that_the_client_has_count_as_completion():
    sequence = admitted(make_request(prompt=(1, 2), emitted=((5, 6),), max_tokens=3))

    assert sequence.returning
    assert (sequence.pending, sequence.num_completion) == (4, 2)
    assert sequence.commit(sequence.segment(4), [], 7) is FinishReason.LENGTH


def test_a_sequence_that_came_with_its_end_is_finished():
    stopping = Stopping(max_tokens=9, stop_token_ids=(6,))
    assert Sequence(make_request(emitted=((6,),), stopping=stopping), 0, 0).finish is (
        FinishReason.STOP
    )
    assert Sequence(make_request(emitted=((5, 5),), max_tokens=2), 0, 0).finish is (
        FinishReason.LENGTH
    )


def test_ending_ids_end_a_sequence_only_after_min_tokens():
    stopping = Stopping(max_tokens=9, min_tokens=1, eos_token_ids=(6,))
    sequence = admitted(make_request(prompt=(1,), stopping=stopping))

    assert sequence.commit(sequence.segment(1), [], 6) is None
    assert sequence.commit(sequence.segment(1), [], 6) is FinishReason.STOP


def test_ignore_eos_leaves_stop_ids():
    stopping = Stopping(max_tokens=9, eos_token_ids=(6,), stop_token_ids=(7,), ignore_eos=True)
    sequence = admitted(make_request(prompt=(1,), stopping=stopping))

    assert sequence.commit(sequence.segment(1), [], 6) is None
    assert sequence.commit(sequence.segment(1), [], 7) is FinishReason.STOP
