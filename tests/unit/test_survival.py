"""Sequences are captured while they run, and go on elsewhere with the tokens due to them."""

from dataclasses import replace
from itertools import pairwise

import pytest

from tests.unit.harness_gateway import (
    Transcript,
    expected_tokens,
    make_engine,
    make_request,
    run_to_end,
)
from workers.gateway.capture import CaptureBook, Captured, Release, is_due
from workers.gateway.prefix_cache import PrefixOptions
from workers.gateway.sequence import Sequence
from workers.gateway.snapshot import Holder, Snapshot, digest_of, snapshot_interval
from workers.types import FinishReason, Output, Request

HOLDER = Holder("g1.1", "somewhere")
OTHER = Holder("g2.1", "elsewhere")


class Site:
    """An engine whose captures arrive at a holder at once, or when the test says so."""

    def __init__(self, interval: int = 4, *, arrive: bool = True, **sizes: object) -> None:
        self.book = CaptureBook(interval)
        self.book.send_to(HOLDER, "w")
        self.arrive = arrive
        self.waiting: list[Captured] = []
        self.rows: dict[tuple[str, int], list[int]] = {}
        self.whole: dict[tuple[str, int], list[Snapshot]] = {}
        self.taken: list[Captured | Release] = []
        self.engine, self.model = make_engine(book=self.book, take=self._take, **sizes)
        self.transcript = Transcript()

    def step(self) -> None:
        self.transcript.read(self.engine.step())

    def run(self, request: Request, tokens: int) -> list[int]:
        """Run a request until so many tokens are out."""
        self.engine.submit(request)
        while len(self.tokens(request)) < tokens:
            self.step()
        return self.tokens(request)

    def tokens(self, request: Request) -> list[int]:
        return self.transcript.tokens.get((request.request_id, 0), [])

    def deliver(self) -> None:
        for captured in self.waiting:
            self._store(captured)
        self.waiting.clear()

    def newest(self, request: Request, num_tokens: int) -> Snapshot | None:
        found = self.whole.get((request.request_id, 0), [])
        return next((s for s in reversed(found) if s.stamp.position < num_tokens), None)

    def released(self) -> list[Release]:
        """Return what the ranks were told of ends, by the next step at the latest."""
        self.run(make_request("next", max_tokens=1), 1)
        return [item for item in self.taken if isinstance(item, Release)]

    def _take(self, item: Captured | Release) -> None:
        self.taken.append(item)
        if isinstance(item, Captured):
            self._store(item) if self.arrive else self.waiting.append(item)

    def _store(self, captured: Captured) -> None:
        stamp, (state, rows) = captured.stamp, captured.shard
        key = (stamp.request_id, stamp.sequence_index)
        known = self.rows.setdefault(key, [])
        assert captured.start <= len(known), "a part without its base"
        known[captured.start :] = rows
        shard = (state, tuple(known))
        self.whole.setdefault(key, []).append(Snapshot(stamp=stamp, shards=(shard,)))
        self.book.stored(stamp, captured.holder)


def resume(request: Request, tokens: list[int], snapshot: Snapshot | None, **sizes: object) -> Site:
    """Let another engine finish a request whose client has some tokens."""
    again = replace(request, assignment=2, emitted=(tuple(tokens),) if tokens else ())
    site = Site(**sizes)
    site.engine.submit(again, {} if snapshot is None else {0: snapshot})
    run_to_end(site.engine, site.transcript)
    return site


@pytest.mark.parametrize("bit_stable", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}])
def test_a_sequence_goes_on_from_any_snapshot_with_the_same_tokens(sampling, bit_stable) -> None:
    request = make_request(prompt=tuple(range(10)), max_tokens=20, **sampling)
    expected = expected_tokens(request)
    for had in range(19):
        site = Site(step_tokens=80, bit_stable=bit_stable)
        tokens = site.run(request, had) if had else []
        snapshot = site.newest(request, 10 + had)
        after = resume(request, tokens, snapshot, step_tokens=80, bit_stable=bit_stable)

        assert after.tokens(request)[had:] == expected[had:]
        stats = after.engine.stats()
        if had > 1:  # what the first step computed is copied before the second
            assert stats.restores == 1
            assert stats.recomputes == 0
            assert stats.replayed_tokens < 8  # twice the interval: one may be on its way
            assert after.model.batches[0].segments[0].start == snapshot.stamp.position


def test_a_long_prompt_is_captured_at_its_chunks_ends() -> None:
    request = make_request(prompt=tuple(range(40)), max_tokens=3)
    site = Site(step_tokens=10)
    site.engine.submit(request)
    for _ in range(3):
        site.step()
    snapshot = site.newest(request, 40)
    assert snapshot.stamp.position == 20  # the third is copied before the fourth step

    after = resume(request, [], snapshot, step_tokens=10)
    assert after.tokens(request) == expected_tokens(request)
    assert after.model.batches[0].segments[0].start == 20


def test_without_a_snapshot_the_prompt_is_computed_again_and_counted() -> None:
    request = make_request(prompt=(1, 2, 3), max_tokens=9)
    tokens = expected_tokens(request)[:5]
    after = resume(request, tokens, None)

    assert after.tokens(request)[5:] == expected_tokens(request)[5:]
    assert after.engine.stats().recomputes == 1
    assert after.engine.stats().recomputed_tokens == 7


def test_prompt_scores_are_computed_though_there_is_a_snapshot() -> None:
    request = make_request(prompt=tuple(range(12)), max_tokens=2, output=Output(prompt_logprobs=0))
    site = Site(step_tokens=5)
    site.engine.submit(request)
    site.step()
    site.step()
    after = resume(request, [], site.newest(request, 12), step_tokens=5)

    assert len(after.transcript.events[0].prompt_logprobs) == 12
    assert after.engine.stats().restores == 0


def test_a_restored_sequence_may_be_preempted() -> None:
    requests = [make_request(f"r{i}", (1, 2, 3), max_tokens=30) for i in range(3)]
    site = Site()
    tokens = {r.request_id: site.run(r, 8)[:8] for r in requests}
    after = Site(num_kv_blocks=14)
    for request in requests:
        emitted = tuple(tokens[request.request_id])
        again = replace(request, assignment=2, emitted=(emitted,))
        after.engine.submit(again, {0: site.newest(request, 3 + len(emitted))})
    run_to_end(after.engine, after.transcript)

    assert after.engine.stats().preemptions > 0
    for request in requests:
        assert after.tokens(request)[8:] == expected_tokens(request)[8:]


@pytest.mark.parametrize(("kept", "begins_at", "restores"), [(0, 24, 1), (20, 24, 1), (30, 28, 0)])
def test_the_longer_of_a_snapshot_and_a_kept_prefix_wins(kept, begins_at, restores) -> None:
    """`kept` tokens of the prompt were served before, and leave a state at a block's end."""
    options = PrefixOptions(num_places=8, least_gain_tokens=4)
    request = make_request(prompt=tuple(range(32)), max_tokens=5)
    site = Site(step_tokens=8)
    site.engine.submit(request)
    for _ in range(4):
        site.step()
    snapshot = site.newest(request, 25)
    assert snapshot.stamp.position == 24

    after = Site(prefix=options, step_tokens=64)
    if kept:
        after.engine.submit(make_request("before", request.prompt_token_ids[:kept], max_tokens=1))
        run_to_end(after.engine, after.transcript)
        after.model.batches.clear()
    after.engine.submit(replace(request, assignment=2), {0: snapshot})
    run_to_end(after.engine, after.transcript)

    assert after.tokens(request) == expected_tokens(request)
    assert after.model.batches[0].segments[0].start == begins_at
    assert after.engine.stats().restores == restores
    # What was restored is kept for others, in blocks of its own.
    again = make_request("again", request.prompt_token_ids, max_tokens=5)
    after.engine.submit(again)
    run_to_end(after.engine, after.transcript)
    assert after.tokens(again) == expected_tokens(request)
    assert after.transcript.last["again", 0].cached_tokens == 28


def test_a_sequence_that_begins_from_a_kept_prefix_is_captured_whole() -> None:
    request = make_request(prompt=tuple(range(32)), max_tokens=12)
    site = Site(prefix=PrefixOptions(num_places=8, least_gain_tokens=4), step_tokens=64)
    site.run(replace(request, request_id="before"), 12)
    site.run(request, 12)
    snapshot = site.newest(request, 41)
    after = resume(request, site.tokens(request)[:9], snapshot)

    assert site.transcript.last["r", 0].cached_tokens > 0
    assert after.engine.stats().restores == 1
    assert after.tokens(request)[9:] == expected_tokens(request)[9:]


def test_a_slow_holder_costs_snapshots_and_no_step() -> None:
    request = make_request(max_tokens=40)
    site = Site(arrive=False)
    site.run(request, 30)
    assert len(site.waiting) == 1
    computed = len(request.prompt_token_ids) + 29  # the last token is not
    first = max(len(request.prompt_token_ids), site.waiting[0].stamp.position)
    assert site.engine.stats().snapshots_skipped == (computed - first) // 4  # whole intervals
    site.deliver()
    site.step()
    site.step()
    assert len(site.waiting) == 1
    assert site.waiting[0].start == site.whole["r", 0][0].stamp.position  # what has come meanwhile


def test_a_snapshot_that_arrives_before_the_next_is_due_skips_none() -> None:
    request = make_request(prompt=tuple(range(32)), max_tokens=30)
    site = Site(arrive=False, step_tokens=8)  # a step of the prompt passes two intervals
    site.engine.submit(request)
    for number in range(30):
        site.step()
        if number % 3 == 2:
            site.deliver()

    assert site.engine.stats().snapshots_stored > 4
    assert site.engine.stats().snapshots_skipped == 0


def test_a_lost_base_and_a_new_holder_get_a_whole_snapshot() -> None:
    request = make_request(max_tokens=60)
    site = Site(arrive=False)
    site.run(request, 10)
    site.deliver()
    for _ in range(6):
        site.step()
    (second,) = site.waiting
    assert second.start > 0
    site.book.failed(second.stamp, HOLDER, has_base=False)
    site.waiting.clear()
    site.step()
    site.step()
    (third,) = site.waiting
    assert third.start == 0

    site.book.send_to(OTHER, "w")
    site.waiting.clear()
    site.step()
    site.step()
    (fourth,) = site.waiting
    assert (fourth.start, fourth.holder) == (0, OTHER)
    site.book.stored(third.stamp, HOLDER)  # the old holder's late word
    assert site.engine.stats().snapshots_stored == 1


def test_a_holder_before_is_told_once_another_one_has_something_whole() -> None:
    site = Site(4)
    site.run(make_request(max_tokens=40), 10)
    site.arrive = False
    site.book.send_to(OTHER, "w")
    while not (sent := [captured for captured in site.waiting if captured.holder == OTHER]):
        site.step()
    (capture,) = sent
    assert site.book.stored(capture.stamp, OTHER) == {HOLDER}
    assert site.book.stored(capture.stamp, OTHER) == frozenset()


def test_all_that_hold_something_of_a_sequence_are_told_that_it_ended() -> None:
    site = Site(4)
    site.run(make_request(max_tokens=20), 10)
    site.arrive = False
    site.book.send_to(OTHER, "w")
    run_to_end(site.engine, site.transcript)
    assert {release.holder for release in site.released()} == {HOLDER, OTHER}


def test_a_holder_that_came_back_is_told_of_the_end_also_if_it_got_nothing_since() -> None:
    sequence = Sequence(make_request(prompt=tuple(range(9))), 0, 0)
    sequence.computed, sequence.state_block = 5, 0
    book = CaptureBook(4)
    book.send_to(HOLDER, "w")
    assert book.capture(sequence) is not None
    for holder in (OTHER, HOLDER):
        book.send_to(holder, "w")

    assert book.forget(sequence) == (False, {HOLDER})


def test_a_holder_out_of_reach_is_asked_again_after_a_quarter_of_the_interval() -> None:
    request = make_request(max_tokens=60)
    site = Site(16, arrive=False)
    site.run(request, 20)
    positions = []
    for _ in range(4):
        capture = site.waiting.pop()
        site.book.failed(capture.stamp, HOLDER, has_base=True)
        positions.append(capture.stamp.position)
        while not site.waiting:
            site.step()
    assert [after - before for before, after in pairwise(positions)][1:] == [4, 4]

    site.book.failed(site.waiting.pop().stamp, HOLDER, has_base=True)
    site.book.send_to(OTHER, "w")
    site.step()
    site.step()
    (other,) = site.waiting
    assert (other.start, other.holder) == (0, OTHER)


@pytest.mark.parametrize("how", ["no holder", "interval 0"])
def test_nothing_is_captured_without_a_holder_or_an_interval(how) -> None:
    site = Site(0 if how == "interval 0" else 4)
    if how == "no holder":
        site.book.send_to(None, "w")
    site.engine.leave()
    request = make_request(max_tokens=20)
    site.engine.submit(request)
    run_to_end(site.engine, site.transcript)

    assert site.whole == {}
    assert site.transcript.last["r", 0].finish is FinishReason.LENGTH  # finished here, not moved


def test_the_holder_hears_of_the_end_and_whether_it_may_go_on() -> None:
    short = make_request("short", max_tokens=2)
    long = make_request("long", max_tokens=20)
    cut = make_request("cut", max_tokens=20)
    site = Site(8)
    for request in (short, long, cut):
        site.engine.submit(request)
    while len(site.tokens(long)) < 12:
        site.step()
    site.engine.abort("cut")
    run_to_end(site.engine, site.transcript)

    found = [(r.ended.request_id, r.ended.has_ended, r.holder) for r in site.released()]
    assert found == [("cut", False, HOLDER), ("long", True, HOLDER)]


def test_the_word_of_an_end_goes_after_a_capture_that_still_waits_for_its_step() -> None:
    site = Site(4)
    site.run(make_request(max_tokens=20), 6)  # 8 are computed: twice the interval
    num_taken = len(site.taken)
    site.engine.abort("r")
    site.step()
    site.released()

    kinds = [type(item) for item in site.taken[num_taken:]]
    assert kinds == [Captured, Release]


def test_a_leaving_gateway_moves_what_is_held_elsewhere() -> None:
    requests = [make_request(f"r{i}", max_tokens=60) for i in range(6)]  # 4 of them run
    site = Site(1000, arrive=False)
    for request in requests:
        site.engine.submit(request)
    for _ in range(5):
        site.step()
    site.engine.leave()
    site.step()
    site.step()
    moved = {k for k, e in site.transcript.last.items() if e.finish is FinishReason.MOVED}
    assert moved == {("r4", 0), ("r5", 0)}  # they had not begun

    for _ in range(4):
        site.step()  # what runs goes on while its snapshot travels
    site.deliver()
    site.step()
    assert not site.engine.has_work
    assert site.engine.stats().moved == 6
    for request in requests[:4]:
        assert site.transcript.last[request.request_id, 0].finish is FinishReason.MOVED
        tokens = site.tokens(request)
        after = resume(request, tokens, site.newest(request, 3 + len(tokens)))
        assert after.tokens(request)[len(tokens) :] == expected_tokens(request)[len(tokens) :]
        assert after.engine.stats().replayed_tokens <= 8
    assert site.released() == []  # the holder keeps them


def test_sequences_of_one_request_move_together() -> None:
    request = make_request(max_tokens=60, num_sequences=2)
    site = Site(1000, arrive=False)
    site.engine.submit(request)
    for _ in range(3):
        site.step()
    site.engine.leave()
    site.step()
    site.step()
    first, second = site.waiting
    site._store(first)
    site.step()
    assert all(e.finish is None for e in site.transcript.last.values())
    site._store(second)
    site.step()
    assert not site.engine.has_work


def test_a_snapshot_fits_its_own_tokens_only() -> None:
    sequence = Sequence(make_request(prompt=tuple(range(9))), 0, 0)
    sequence.computed, sequence.state_block = 5, 0
    book = CaptureBook(4)
    book.send_to(HOLDER, "w")
    snapshot = Snapshot(stamp=book.capture(sequence).stamp, shards=())

    assert snapshot.fits(range(6), "w")
    assert not snapshot.fits(range(5), "w")  # no token would be left to compute
    assert not snapshot.fits((0, 1, 2, 3, 5, 5), "w")
    assert not snapshot.fits(range(6), "other weights")
    assert not replace(snapshot, stamp=replace(snapshot.stamp, position=0)).fits(range(6), "w")
    assert digest_of([1, 23]) != digest_of([12, 3])


def test_the_interval_follows_a_byte_budget() -> None:
    assert [is_due(n, 10, 4) for n in (13, 14, 3)] == [False, True, False]
    assert snapshot_interval(64, 1000, 0) == 64
    assert snapshot_interval(0, 1000, 10) == 0
    assert snapshot_interval(64, 1000, 10) == 100
    assert snapshot_interval(64, 1000, 999) == 64
