"""What sequences leave in the prefix cache, and what later ones find; over the history model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.harness_gateway import (
    Transcript,
    expected_tokens,
    make_engine,
    make_request,
    run_to_end,
)
from workers.gateway.prefix_cache import PrefixOptions
from workers.types import Output

SMALL = PrefixOptions(num_places=8, least_gain_tokens=4, first_boundary_tokens=8)
SYSTEM = tuple(range(1, 23))


def serve(engine, *requests):
    """Run requests one after the other; each must give its tokens. Returns their cached tokens."""
    cached = []
    for request in requests:
        engine.submit(request)
        transcript = run_to_end(engine)
        for index in range(request.num_sequences):
            key = (request.request_id, index)
            known = len(request.emitted[index]) if request.emitted else 0
            assert transcript.tokens[key][known:] == expected_tokens(request, index)[known:]
        cached.append(transcript.last[request.request_id, 0].cached_tokens)
    return cached


def test_the_same_prompt_again_is_computed_from_shortly_before_its_end():
    engine, _ = make_engine(prefix=SMALL)

    assert serve(engine, make_request(prompt=SYSTEM), make_request(prompt=SYSTEM)) == [0, 20]
    stats = engine.stats()
    assert (stats.prefix_lookups, stats.prefix_hits, stats.prefix_hit_tokens) == (2, 1, 20)


def test_a_prompt_of_whole_blocks_leaves_its_last_row_to_compute():
    engine, _ = make_engine(prefix=SMALL)

    assert serve(engine, *[make_request(prompt=SYSTEM[:20])] * 2) == [0, 16]


def test_a_turn_goes_on_exactly_where_the_last_one_ended():
    engine, _ = make_engine(prefix=SMALL)
    first = make_request(prompt=SYSTEM, max_tokens=9)
    history = (*SYSTEM, *expected_tokens(first))
    second = make_request(prompt=(*history, 7, 8, 9), max_tokens=9)

    # All but the last token, which was sampled and never computed.
    assert serve(engine, first, second) == [0, len(history) - 1]


def test_prompts_that_part_have_a_state_where_they_part_from_the_second_on():
    engine, _ = make_engine(prefix=SMALL)
    prompts = [(*SYSTEM, *[9 + i] * 12) for i in range(3)]

    # A boundary at 16 is there from the first; the junction lies at 20, behind 22 common tokens.
    cached = serve(engine, *[make_request(prompt=p, max_tokens=1) for p in prompts])
    assert cached == [0, 16, 20]


def test_a_short_gain_is_not_worth_a_state():
    options = PrefixOptions(num_places=8, least_gain_tokens=30, first_boundary_tokens=1024)
    engine, model = make_engine(prefix=options, step_tokens=64)
    serve(engine, make_request(prompt=SYSTEM, max_tokens=4))

    assert engine.stats().prefix_states == 0
    assert [len(b.segments[0].token_ids) for b in model.batches] == [22, 1, 1, 1]


def test_tenants_do_not_see_each_others_prompts():
    engine, _ = make_engine(prefix=SMALL)
    requests = [make_request(prompt=SYSTEM, cache_salt=salt) for salt in ("a", "b", "a")]

    assert serve(engine, *requests) == [0, 0, 20]


def test_without_places_nothing_is_kept():
    engine, _ = make_engine(prefix=PrefixOptions(num_places=0))

    assert serve(engine, *[make_request(prompt=SYSTEM)] * 2) == [0, 0]
    assert engine.stats().prefix_blocks == 0


def test_a_prompt_whose_scores_are_wanted_is_computed_whole():
    engine, _ = make_engine(prefix=SMALL)
    scored = make_request(prompt=SYSTEM, output=Output(prompt_logprobs=0))
    again = make_request(prompt=SYSTEM)

    assert serve(engine, scored, scored, again) == [0, 0, 20]


def test_a_resumed_request_profits_and_counts_only_its_prompt():
    engine, _ = make_engine(prefix=SMALL)
    ended = make_request(prompt=SYSTEM, max_tokens=9)
    emitted = tuple(expected_tokens(ended))
    resumed = make_request(prompt=SYSTEM, max_tokens=12, emitted=(emitted,))

    assert serve(engine, ended, resumed) == [0, len(SYSTEM)]
    assert engine.stats().prefix_hit_tokens == len(SYSTEM) + 8


def test_states_are_forgotten_apart_from_blocks():
    engine, _ = make_engine(prefix=PrefixOptions(num_places=1, least_gain_tokens=4))
    first, other = make_request(prompt=SYSTEM), make_request(prompt=SYSTEM[::-1])
    serve(engine, first, other)
    stats = engine.stats()

    assert stats.prefix_states == 1
    assert stats.prefix_state_evictions > 0
    assert stats.prefix_block_evictions == 0
    assert serve(engine, first) == [0]  # its KV is there, a state is not


def test_what_is_idle_keeps_to_its_budget():
    options = PrefixOptions(num_places=8, max_idle_blocks=5, least_gain_tokens=4)
    engine, _ = make_engine(prefix=options)
    for i in range(6):
        serve(engine, make_request(prompt=(*SYSTEM[i:], i)))

        assert engine.stats().prefix_blocks <= 5


def test_the_cache_gives_way_to_whoever_runs():
    engine, _ = make_engine(prefix=SMALL, num_kv_blocks=9)
    serve(engine, *[make_request(prompt=SYSTEM[i:], max_tokens=6) for i in range(9)])

    stats = engine.stats()
    assert stats.prefix_block_evictions > 0
    assert stats.preemptions == 0


@pytest.mark.parametrize(("prompt", "again", "cached"), [
    (130, 130, 128),  # two whole chunks
    (128, 128, 64),  # the last row's logits are needed
    (130, 200, 128),
    (100, 200, 64),  # 64 to 100 was no whole chunk, and is not what 200 tokens would have computed
    (60, 60, 0),
])  # fmt: skip
def test_bit_stable_hits_end_where_whole_chunks_of_both_prompts_do(prompt, again, cached):
    engine, _ = make_engine(bit_stable=True, step_tokens=200, context_tokens=400, prefix=SMALL)
    tokens = tuple(i % 47 for i in range(again))
    first = make_request(prompt=tokens[:prompt], max_tokens=9)
    second = make_request(prompt=tokens, max_tokens=9)

    assert serve(engine, first, second) == [0, cached]


def test_bit_stable_never_reuses_what_was_decoded():
    engine, _ = make_engine(bit_stable=True, step_tokens=200, context_tokens=400, prefix=SMALL)
    first = make_request(prompt=SYSTEM, max_tokens=120)
    history = (*SYSTEM, *expected_tokens(first))

    assert serve(engine, first, make_request(prompt=history, max_tokens=2)) == [0, 0]


def test_bit_stable_segments_are_those_of_a_miss():
    tokens = tuple(i % 47 for i in range(150))
    request = make_request(prompt=tokens, max_tokens=4)

    def cuts(engine, model):
        model.batches.clear()
        serve(engine, request)
        return [(s.start, len(s.token_ids)) for b in model.batches for s in b.segments]

    options = {"bit_stable": True, "step_tokens": 200, "block_tokens": 24, "context_tokens": 400}
    warm = make_engine(**options, num_kv_blocks=100, prefix=SMALL)
    off = make_engine(**options)
    miss = cuts(*off)

    assert cuts(*warm) == miss
    hit = cuts(*warm)
    assert hit == miss  # 24 and 64 have no common multiple within 150 tokens
    longer = make_request(prompt=(*tokens, *tokens), max_tokens=4)
    serve(warm[0], longer)
    warm[1].batches.clear()
    assert serve(warm[0], longer) == [192]
    assert warm[1].batches[0].segments[0].start == 192


words = st.sampled_from([(1, 2, 3), (4,) * 5, (5, 6), (7,) * 9, (1, 2, 3, 4)])
submissions = st.fixed_dictionaries(
    {
        "prompt": st.lists(words, min_size=1, max_size=6).map(lambda ws: sum(ws, ())),
        "max_tokens": st.integers(1, 12),
        "num_sequences": st.integers(1, 2),
        "temperature": st.sampled_from([0.0, 0.8]),
        "seed": st.integers(0, 3),
        "cache_salt": st.sampled_from(["", "", "other"]),
        "output": st.sampled_from([Output(), Output(), Output(logprobs=1, prompt_logprobs=0)]),
    }
)


@settings(derandomize=True, max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(submissions, st.integers(0, 6), st.booleans()), min_size=1, max_size=12),
    st.integers(18, 40), st.integers(1, 6), st.sampled_from([None, 0, 4]), st.booleans(),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_reuse_never_changes_tokens(plan, num_kv_blocks, num_places, idle, bit_stable, random):
    options = PrefixOptions(
        num_places=num_places, max_idle_blocks=idle, least_gain_tokens=4, first_boundary_tokens=8
    )
    stretch = 8 if bit_stable else 1  # to prompts of several chunks
    num_kv_blocks *= stretch
    engine, model = make_engine(
        num_kv_blocks=num_kv_blocks, max_sequences=3, step_tokens=66 if bit_stable else 7,
        bit_stable=bit_stable, prefix=options, context_tokens=400,
    )  # fmt: skip
    model.fail = lambda batch: len(batch.segments) > 1 and random.random() < 0.2
    transcript, kept = Transcript(), []
    for number, (fields, num_steps, is_aborted) in enumerate(plan):
        prompt = tuple(token for token in fields["prompt"] for _ in range(stretch))
        request = make_request(f"r{number}", **{**fields, "prompt": prompt})
        if len(request.prompt_token_ids) + request.stopping.max_tokens > num_kv_blocks * 4:
            continue
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
    kv = engine._scheduler.kv
    assert kv.num_used == engine._scheduler.states.num_used == 0
    assert kv.num_kept == kv.num_idle == kv.num_blocks - kv.num_free
    assert idle is None or kv.num_idle <= idle
    assert engine.stats().prefix_states <= num_places
