from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from tests.unit.harness_gateway import (
    HistoryModel,
    Transcript,
    expected_tokens,
    history_logits,
    make_engine,
    make_request,
    run_to_end,
)
from workers.errors import (
    DuplicateRequestError,
    GatewayFailedError,
    InvalidRequestError,
    OverloadedError,
    PoisonError,
)
from workers.gateway.lockstep import Follower, Leader, StoreVote
from workers.model.batch import Segment, StepBatch
from workers.types import FinishReason, Output, Stopping


def assert_all_free(engine):
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.state_blocks_used) == (0, 0)
    assert (stats.running, stats.waiting) == (0, 0)


def test_a_request_gives_the_models_tokens_one_event_a_step():
    engine, _ = make_engine()
    request = make_request(max_tokens=5)
    engine.submit(request)
    transcript = run_to_end(engine)

    assert transcript.tokens["r", 0] == expected_tokens(request)
    assert [e.first_token_index for e in transcript.events] == [0, 1, 2, 3, 4]
    assert transcript.last["r", 0].finish is FinishReason.LENGTH
    assert_all_free(engine)
    assert engine.stats().tokens_generated == 5
    assert engine.stats().tokens_prefilled == 3


def test_a_stop_token_ends_the_sequence_and_is_named():
    request = make_request(max_tokens=20)
    stop = expected_tokens(request)[3]
    engine, _ = make_engine()
    engine.submit(make_request(stopping=Stopping(max_tokens=20, stop_token_ids=(stop,))))
    transcript = run_to_end(engine)
    last = transcript.last["r", 0]

    assert transcript.tokens["r", 0][-1] == stop == last.stop_token_id
    assert last.finish is FinishReason.STOP


def test_several_sequences_of_a_request_are_seeded_apart():
    engine, _ = make_engine()
    request = make_request(num_sequences=3, temperature=1.0, seed=4, max_tokens=8)
    engine.submit(request)
    transcript = run_to_end(engine)
    found = [transcript.tokens["r", index] for index in range(3)]

    assert found == [expected_tokens(request, index) for index in range(3)]
    assert len({tuple(tokens) for tokens in found}) == 3


def test_prompt_logprobs_come_once_with_the_first_event():
    prompt = tuple(range(1, 40))
    engine, _ = make_engine(step_tokens=7)
    engine.submit(make_request(prompt=prompt, output=Output(logprobs=1, prompt_logprobs=2)))
    transcript = run_to_end(engine)
    first, *others = transcript.events

    assert [p and p.token_id for p in first.prompt_logprobs] == [None, *prompt[1:]]
    for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
        expected = history_logits(prompt[:position]).log_softmax(-1)
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)
        assert [i for i, _ in entry.top] == expected.topk(2).indices.tolist()
    assert all(e.prompt_logprobs == () and len(e.logprobs) == 1 for e in others)


@pytest.mark.parametrize("bit_stable", [False, True])
def test_resumption_goes_on_as_if_nothing_had_happened(bit_stable):
    settings = {
        "prompt": tuple(range(1, 20)), "max_tokens": 12, "temperature": 0.8, "seed": 3,
        "num_sequences": 2, "repetition_penalty": 1.2, "presence_penalty": 0.4,
    }  # fmt: skip
    whole = make_request(**settings)
    expected = [expected_tokens(whole, index) for index in range(2)]
    engine, _ = make_engine(bit_stable=bit_stable, step_tokens=80)
    engine.submit(make_request(**settings, emitted=(tuple(expected[0][:5]), ())))
    transcript = run_to_end(engine)

    assert transcript.events[0].first_token_index in {0, 5}
    assert transcript.tokens["r", 0][5:] == expected[0][5:]
    assert transcript.tokens["r", 1] == expected[1]


def test_a_request_resumed_after_its_end_ends_at_once():
    engine, model = make_engine()
    engine.submit(make_request(emitted=((4, 4, 4, 4, 4),), max_tokens=5))
    (event,) = engine.step()

    assert (event.finish, event.first_token_index, event.token_ids) == (FinishReason.LENGTH, 5, ())
    assert not engine.has_work
    assert model.batches == []


def test_abort_frees_the_blocks_within_one_step():
    engine, _ = make_engine()
    engine.submit(make_request(max_tokens=50, num_sequences=2))
    engine.step()
    assert engine.stats().kv_blocks_used > 0
    engine.abort("r")
    engine.abort("r")
    engine.abort("never seen")

    assert engine.step() == []
    assert_all_free(engine)
    assert not engine.has_work


def test_an_abort_during_a_step_frees_the_blocks_at_its_end():
    engine, model = make_engine()
    engine.submit(make_request(max_tokens=50))
    engine.step()
    again = make_request(prompt=(7, 8), max_tokens=3)

    def replace_request(_):
        model.fail = lambda _: False
        engine.abort("r")
        engine.submit(again)  # the id is free at once

    model.fail = replace_request
    assert engine.step() == []
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.waiting) == (0, 1)
    assert run_to_end(engine).tokens["r", 0] == expected_tokens(again)


def test_a_failed_step_leaves_everything_as_it_was():
    engine, model = make_engine()
    request = make_request(max_tokens=9)
    engine.submit(request)
    failures = iter([False, True, False, True] * 20)
    model.fail = lambda _: next(failures)
    transcript = run_to_end(engine)

    assert transcript.tokens["r", 0] == expected_tokens(request)
    assert len(model.batches) > 9


def test_what_fails_alone_ends_and_the_others_never_notice():
    engine, model = make_engine(max_sequences=8, step_tokens=40)
    requests = [make_request(f"r{i}", (i, 2, 3)) for i in range(1, 6)]
    for request in requests:
        engine.submit(request)
    model.fail = lambda batch: any(s.token_ids[0] == 3 for s in batch.segments if s.start == 0)
    transcript = run_to_end(engine)

    assert transcript.last["r3", 0].finish is FinishReason.ERROR
    assert "planned failure" in transcript.last["r3", 0].error
    for request in requests:
        if request.request_id != "r3":
            assert transcript.tokens[request.request_id, 0] == expected_tokens(request)
    assert_all_free(engine)


@pytest.mark.parametrize("guilty", [{3}, {1, 4}, {1, 2, 3, 4, 5}])
def test_whose_rows_end_expert_workers_is_failed_at_once_and_computed_never_again(guilty):
    engine, model = make_engine(max_sequences=8, step_tokens=40)
    requests = {i: make_request(f"r{i}", (i, 2, 3)) for i in range(1, 6)}
    for request in requests.values():
        engine.submit(request)
    num_poisoned = 0

    def poison(batch):
        nonlocal num_poisoned
        found = [
            i for i, s in enumerate(batch.segments) if s.start == 0 and s.token_ids[0] in guilty
        ]
        num_poisoned += bool(found)
        if found:
            raise PoisonError(tuple(found))
        return False

    model.fail = poison
    transcript = run_to_end(engine)

    assert num_poisoned == 1
    for i, request in requests.items():
        if i in guilty:
            assert transcript.last[f"r{i}", 0].finish is FinishReason.ERROR
            assert "expert workers ended" in transcript.last[f"r{i}", 0].error
        else:
            assert transcript.tokens[f"r{i}", 0] == expected_tokens(request)
    assert_all_free(engine)


@pytest.mark.parametrize("step_tokens", [40, 4])
def test_all_sequences_of_a_request_that_ends_expert_workers_fail_with_the_first(step_tokens):
    """Also those for which there was no room in the step."""
    engine, model = make_engine(max_sequences=8, step_tokens=step_tokens)
    engine.submit(make_request("guilty", (9, 2), num_sequences=3))
    innocent = make_request("innocent", (1, 2))
    engine.submit(innocent)
    num_poisoned = 0

    def poison(batch):
        nonlocal num_poisoned
        found = [i for i, s in enumerate(batch.segments) if 9 in s.token_ids]
        num_poisoned += bool(found)
        if found:
            raise PoisonError(tuple(found[:1]))  # the step ends with the first that is known
        return False

    model.fail = poison
    transcript = run_to_end(engine)
    assert num_poisoned == 1
    assert [transcript.last["guilty", i].finish for i in range(3)] == [FinishReason.ERROR] * 3
    assert transcript.tokens["innocent", 0] == expected_tokens(innocent)
    assert_all_free(engine)


def test_a_gateway_on_which_everything_fails_is_at_fault_itself():
    engine, model = make_engine()
    engine.submit(make_request("a"))
    engine.submit(make_request("b"))
    model.fail = lambda _: True

    with pytest.raises(GatewayFailedError, match="all requests fail"):
        engine.step()


def test_a_lone_request_that_fails_does_not_end_the_gateway():
    engine, model = make_engine()
    engine.submit(make_request("a", num_sequences=2))
    model.fail = lambda _: True
    events = engine.step()
    model.fail = lambda _: False
    engine.submit(make_request("b"))

    assert [e.finish for e in events] == [FinishReason.ERROR] * 2
    assert run_to_end(engine).tokens["b", 0] == expected_tokens(make_request("b"))


WRONG_REQUESTS = [
    ({"prompt": ()}, "prompt: must hold at least one"),
    ({"prompt": (1, 50)}, "prompt: token ids must be in 0 to 49"),
    ({"prompt": (-1,)}, "prompt: token ids"),
    ({"max_tokens": 0}, "max_tokens: must be at least 1"),
    ({"max_tokens": 198}, "3 prompt tokens and 198 new ones exceed the context of 200"),
    ({"logit_bias": ((50, 1.0),)}, "logit_bias: token ids"),
    ({"stopping": Stopping(max_tokens=3, stop_token_ids=(99,))}, "stop_token_ids: token ids"),
    ({"emitted": ((50,),)}, "resume_from: token ids"),
    ({"emitted": ((1,), (2,))}, "resume_from: must have one entry"),
    ({"num_sequences": 0}, "num_sequences: must be at least 1"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_REQUESTS)
def test_wrong_requests_are_refused_with_the_field(fields, message):
    engine, _ = make_engine()

    with pytest.raises(InvalidRequestError, match=message):
        engine.submit(make_request(**fields))
    assert not engine.has_work


def test_an_id_in_flight_is_refused_and_free_again_afterwards():
    engine, _ = make_engine()
    engine.submit(make_request())
    with pytest.raises(DuplicateRequestError):
        engine.submit(make_request())
    run_to_end(engine)

    engine.submit(make_request())


def test_only_requests_that_were_never_admitted_can_be_too_many():
    engine, _ = make_engine(max_waiting=1, max_sequences=1)
    engine.submit(make_request("a", num_sequences=2))
    with pytest.raises(OverloadedError) as refusal:
        engine.submit(make_request("b"))
    engine.submit(make_request("c", emitted=((1,),)))
    engine.submit(replace(make_request("d"), was_admitted=True))

    assert refusal.value.retry_after_s > 0
    assert engine.stats().waiting == 4


submissions = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 49), min_size=1, max_size=25).map(tuple),
        "max_tokens": st.integers(1, 12),
        "num_sequences": st.integers(1, 2),
        "temperature": st.sampled_from([0.0, 0.8]),
        "seed": st.integers(0, 99),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "output": st.sampled_from([Output(), Output(logprobs=1, prompt_logprobs=0)]),
    }
)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(submissions, st.integers(0, 4), st.booleans()), min_size=1, max_size=8),
    st.integers(10, 20), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
def test_company_preemption_failures_and_aborts_never_change_tokens(
    plan, num_kv_blocks, bit_stable, random
):
    engine, model = make_engine(
        num_kv_blocks=num_kv_blocks, max_sequences=3, step_tokens=66 if bit_stable else 5,
        bit_stable=bit_stable,
    )  # fmt: skip
    model.fail = lambda batch: len(batch.segments) > 1 and random.random() < 0.2
    transcript, kept = Transcript(), []
    for number, (fields, num_steps, is_aborted) in enumerate(plan):
        request = make_request(f"r{number}", **fields)
        engine.submit(request)
        for _ in range(num_steps):
            transcript.read(engine.step())
        if is_aborted:
            engine.abort(request.request_id)
        else:
            kept.append(request)
    run_to_end(engine, transcript)

    for request in kept:
        for index in range(request.num_sequences):
            key = (request.request_id, index)
            assert transcript.tokens[key] == expected_tokens(request, index)
        if request.output.prompt_logprobs is not None:
            entries = [
                entry.token_id if entry else None
                for event in transcript.events
                if event.request_id == request.request_id
                for entry in event.prompt_logprobs
            ]
            assert entries == [None, *request.prompt_token_ids[1:]]
    assert_all_free(engine)


class Wire:
    """The group of one leader and one follower, by hand: what rank 0 sends, rank 1 gets."""

    size = 2

    def __init__(self):
        self.messages = []

    def broadcast_bytes(self, payload):
        if payload is None:
            return self.messages.pop(0)
        self.messages.append(payload)
        return payload


class FixedVote:
    def __init__(self, unanimous):
        self.unanimous = unanimous

    def is_unanimous(self, number):
        return self.unanimous


def make_pair(unanimous=True):
    wire, models = Wire(), (HistoryModel(4), HistoryModel(4))
    leader = Leader(wire, models[0].forward, models[0], FixedVote(unanimous))
    follower = Follower(wire, models[1].forward, models[1], FixedVote(unanimous))
    return leader, follower, models


def batch_of(start, *tokens):
    return StepBatch(
        segments=(Segment(token_ids=tokens, start=start, state_block=0, kv_blocks=(0, 1)),)
    )


def test_a_follower_commits_and_discards_what_the_leader_did():
    leader, follower, models = make_pair()
    leader.compute(batch_of(0, 1, 2))
    assert follower.follow()
    assert models[1]._staged
    leader.commit()
    leader.compute(batch_of(2, 3))
    assert follower.follow()
    assert models[1]._states[0] == (1, 2)
    leader.discard()
    leader.idle()
    assert follower.follow()

    assert models[0]._states == models[1]._states == {0: (1, 2)}
    assert not models[1]._staged
    leader.stop()
    assert not follower.follow()


@dataclass(frozen=True)
class Reread:
    """An operation that sees what was committed; a module's own, so that it can be sent."""

    block: int
    seen: ClassVar[list[tuple[int, ...]]] = []

    def apply(self, cache):
        self.seen.append(cache._states[self.block])


def test_what_comes_between_steps_sees_the_last_step_on_every_rank():
    Reread.seen.clear()
    leader, follower, _ = make_pair()
    leader.compute(batch_of(0, 1, 2))
    follower.follow()
    leader.commit()
    leader.enqueue(Reread(0))
    leader.compute(batch_of(2, 3))
    follower.follow()
    leader.discard()
    leader.idle()
    follower.follow()

    assert Reread.seen == [(1, 2), (1, 2)]


def test_an_operation_that_fails_ends_the_gateway():
    leader, follower, _ = make_pair()
    leader.enqueue(Reread(9))
    with pytest.raises(GatewayFailedError, match="Reread failed"):
        leader.idle()
    with pytest.raises(GatewayFailedError, match="Reread failed"):
        follower.follow()


def test_a_failure_on_all_ranks_can_be_tried_again():
    leader, follower, models = make_pair()
    for model in models:
        model.fail = lambda _: True
    with pytest.raises(RuntimeError, match="planned"):
        leader.compute(batch_of(0, 1))
    follower.follow()
    for model in models:
        model.fail = lambda _: False
    leader.compute(batch_of(0, 1))
    follower.follow()

    assert models[0]._staged == models[1]._staged == {0: (1,)}


def test_a_failure_on_one_rank_only_ends_the_gateway():
    leader, follower, models = make_pair(unanimous=False)
    models[1].fail = lambda _: True
    leader.compute(batch_of(0, 1))

    with pytest.raises(GatewayFailedError, match="some ranks only"):
        follower.follow()


def test_a_vote_is_unanimous_when_every_rank_reports_the_same_step():
    store = HashStore()
    votes = [StoreVote(store, rank, 2, timeout_s=5.0) for rank in range(2)]
    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(lambda vote: vote.is_unanimous(7), votes)) == [True, True]

    hasty = StoreVote(store, 0, 2, timeout_s=0.01)
    assert not hasty.is_unanimous(8)
