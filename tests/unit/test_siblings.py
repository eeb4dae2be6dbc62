"""Ranks of one gateway that watch each other over a store of counters."""

from collections import Counter

from workers.gateway.siblings import Siblings


class Counts:
    """The store; broken when its host is gone."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.is_broken = False

    def add(self, key: str, amount: int) -> int:
        if self.is_broken:
            raise RuntimeError("connection reset")
        self.counts[key] += amount
        return self.counts[key]


def ticks_until_silent(watcher: Siblings, others: tuple[Siblings, ...], limit: int = 50) -> int:
    for number in range(limit):
        for other in others:
            assert other.tick() is None
        if watcher.tick():
            return number
    return limit


def ranks(size: int) -> tuple[Counts, list[Siblings]]:
    store = Counts()
    return store, [Siblings(store, rank, size, 2.0) for rank in range(size)]


def test_ranks_that_show_themselves_are_never_silent() -> None:
    _, (first, *others) = ranks(3)

    assert ticks_until_silent(first, tuple(others)) == 50


def test_one_frozen_rank_is_named_by_rank_0_and_the_others_blame_nobody() -> None:
    _, (first, second, third) = ranks(3)
    for rank in (second, third, first):
        rank.tick()

    problems = []
    for _ in range(20):
        assert second.tick() is None
        problems.append(first.tick())
    assert problems[:7] == [None] * 7
    assert problems[7] == "rank 2 of this gateway is silent for 2 s"


def test_a_frozen_rank_0_is_noticed_by_the_others() -> None:
    _, (first, second) = ranks(2)
    first.tick()

    assert ticks_until_silent(second, ()) == 8


def test_a_rank_that_has_not_begun_is_waited_for() -> None:
    _, (first, _) = ranks(2)

    assert ticks_until_silent(first, ()) == 50


def test_a_store_that_is_gone_is_the_end() -> None:
    store, (_, second) = ranks(2)
    store.is_broken = True

    assert second.tick() == "rank 0 of this gateway is gone: connection reset"
