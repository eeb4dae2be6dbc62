"""A prompt goes on from what another gateway has kept of its begin; over the history model."""

from dataclasses import replace

import pytest

from tests.unit.harness_gateway import (
    Transcript,
    expected_tokens,
    make_engine,
    make_request,
    run_to_end,
)
from workers.gateway.capture import CaptureBook, Captured, Release
from workers.gateway.prefix_cache import PrefixOptions
from workers.gateway.prefix_digest import prefix_digest
from workers.gateway.snapshot import Holder, Snapshot
from workers.types import Output

CACHE = PrefixOptions(num_places=8, least_gain_tokens=4, first_boundary_tokens=1024)
PROMPT = tuple(range(1, 31))
RECEIVER = Holder("gateway-1.1", "elsewhere")


class Giver:
    """A gateway that keeps the begin of a prompt, and what it sends."""

    def __init__(self, **sizes):
        self.sent = []
        book = CaptureBook(0)
        book.send_to(None, "w")
        self.engine, self.model = make_engine(
            book=book, take=self.sent.append, prefix=CACHE, **sizes
        )

    def serve(self, request):
        self.engine.submit(request)
        return run_to_end(self.engine).tokens[request.request_id, 0]

    def give(self, token_ids, salt="", most_tokens=1000):
        """Return what another gateway gets that asks for some tokens; None if they are not kept."""
        digest = prefix_digest(salt, token_ids)
        is_kept = self.engine.send_prefix(digest, "name", RECEIVER, most_tokens)
        self.engine.step()
        self.engine._leader.idle()
        if not is_kept.result(timeout=0):
            assert not self.sent
            return None
        captured, released = self.sent
        self.sent.clear()
        assert isinstance(captured, Captured)
        assert isinstance(released, Release)
        assert captured.holder == released.holder == RECEIVER
        assert not released.ended.has_ended
        state, rows = captured.shard
        return Snapshot(stamp=captured.stamp, shards=((state, tuple(rows)),))


def begin(engine, request, prefix):
    """Serve a request that begins with a prefix; returns its cached tokens."""
    found = dict.fromkeys(range(request.num_sequences), prefix)
    engine.submit(request, found if prefix is not None else {})
    transcript = run_to_end(engine, Transcript())
    for index in range(request.num_sequences):
        assert transcript.tokens[request.request_id, index] == expected_tokens(request, index)
    return transcript.last[request.request_id, 0].cached_tokens


def test_a_prompt_goes_on_from_what_another_gateway_kept_and_keeps_it_for_the_next():
    giver = Giver()
    giver.serve(make_request(prompt=PROMPT))
    prefix = giver.give(PROMPT[:28])
    assert prefix.fits(PROMPT, "w")
    assert not prefix.fits((9, *PROMPT), "w")

    engine, model = make_engine(prefix=CACHE)
    longer = make_request("a", (*PROMPT, 7, 8), max_tokens=3)
    assert begin(engine, longer, prefix) == 28
    assert model.batches[0].segments[0].start == 28
    other = make_request("b", (*PROMPT[:28], 40, 41), max_tokens=3)
    assert begin(engine, other, None) == 28  # without asking anybody again
    stats = engine.stats()
    assert (stats.prefix_fetches, stats.prefix_fetched_tokens) == (1, 28)
    assert (stats.restores, stats.replayed_tokens, stats.prefix_hits) == (0, 0, 1)


def test_a_turn_goes_on_from_the_middle_of_a_block():
    giver = Giver()
    answer = giver.serve(make_request(prompt=PROMPT, max_tokens=9))
    history = (*PROMPT, *answer)
    prefix = giver.give(history[:-1])

    engine, _ = make_engine(prefix=CACHE)
    second = make_request("second", (*history, 3, 4), max_tokens=6)
    assert begin(engine, second, prefix) == len(history) - 1


def test_all_sequences_of_a_request_go_on_from_it():
    giver = Giver()
    giver.serve(make_request(prompt=PROMPT))
    prefix = giver.give(PROMPT[:28])

    engine, model = make_engine(prefix=CACHE)
    request = make_request("n", PROMPT, num_sequences=3, temperature=1.0, seed=5)
    assert begin(engine, request, prefix) == 28
    assert min(s.start for batch in model.batches for s in batch.segments) == 28


def test_what_is_not_kept_any_more_is_not_sent():
    giver = Giver()
    giver.serve(make_request(prompt=PROMPT, cache_salt="tenant"))

    assert giver.give(PROMPT[:28]) is None  # of another tenant
    assert giver.give(PROMPT[:20], "tenant") is None  # there is no state
    assert giver.give(PROMPT[:28], "tenant", most_tokens=27) is None  # there is no room for it
    assert giver.give(PROMPT[:28], "tenant", most_tokens=28) is not None


def test_few_are_copied_aside_in_one_step():
    giver = Giver()
    giver.serve(make_request(prompt=PROMPT))
    digest = prefix_digest("", PROMPT[:28])
    asked = [giver.engine.send_prefix(digest, f"n{i}", RECEIVER, 28) for i in range(3)]
    for num_done in range(1, 4):
        giver.engine.step()
        assert [each.done() for each in asked] == [i < num_done for i in range(3)]
    assert not giver.engine.has_work


def test_what_is_asked_for_is_copied_before_it_makes_way():
    giver = Giver(num_kv_blocks=10, max_sequences=2)
    giver.serve(make_request(prompt=PROMPT, max_tokens=2))
    digest = prefix_digest("", PROMPT[:28])
    is_kept = giver.engine.send_prefix(digest, "name", RECEIVER, 28)
    large = make_request("large", tuple(range(5, 43)), max_tokens=2)  # needs every block
    giver.engine.submit(large)
    assert run_to_end(giver.engine).tokens["large", 0] == expected_tokens(large)

    assert is_kept.result(timeout=0)
    state, rows = giver.sent[0].shard
    assert tuple(rows) == PROMPT[:28] == state


def test_a_prefix_that_nobody_waits_for_any_more_is_not_sent():
    giver = Giver()
    giver.serve(make_request(prompt=PROMPT))
    assert giver.engine.send_prefix(prefix_digest("", PROMPT[:28]), "name", RECEIVER, 28).cancel()
    giver.engine.step()
    giver.engine._leader.idle()
    assert not giver.sent


def test_bit_stable_gateways_send_nothing():
    giver = Giver(bit_stable=True, step_tokens=80, num_kv_blocks=60)
    prompt = tuple(i % 40 for i in range(100))
    giver.serve(make_request(prompt=prompt))
    assert giver.engine.prefixes(10)
    assert giver.give(prompt[:64]) is None


def test_scores_of_a_prompt_need_all_its_rows():
    giver = Giver()
    giver.serve(make_request(prompt=PROMPT))
    engine, _ = make_engine(prefix=CACHE)
    request = make_request("s", PROMPT, output=Output(logprobs=0, prompt_logprobs=0))
    assert begin(engine, request, giver.give(PROMPT[:28])) == 0
    assert engine.stats().prefix_fetches == 0


@pytest.mark.parametrize("is_prefix", [False, True])
def test_room_is_counted_for_a_snapshot_that_shares_no_blocks(is_prefix):
    """Blocks that a match would share are not spared to a sequence that goes on from a snapshot."""
    giver = Giver()
    giver.serve(make_request(prompt=PROMPT))
    prefix = giver.give(PROMPT[:28])
    if not is_prefix:
        prefix = replace(prefix, stamp=replace(prefix.stamp, request_id="late"))

    engine, _ = make_engine(prefix=CACHE, num_kv_blocks=13, max_sequences=2)
    begin(engine, make_request("warm", PROMPT[:20], max_tokens=2), None)
    running = make_request("running", (*PROMPT[:20], *range(30, 44)), max_tokens=3)
    engine.submit(running)
    engine.step()  # it holds the blocks of what is shared
    late = make_request("late", PROMPT, max_tokens=4)
    engine.submit(late, {0: prefix})
    transcript = run_to_end(engine)
    assert transcript.tokens["late", 0] == expected_tokens(late)
    assert transcript.tokens["running", 0][-1] == expected_tokens(running)[-1]
