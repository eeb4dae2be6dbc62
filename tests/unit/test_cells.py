"""Cells: who calls whom, what is borrowed, and that each cell stays whole by itself."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.staffing import shares_of
from tests.unit.test_controller import Bench
from workers.errors import RefusedError
from workers.placement import (
    NO_CELL,
    ExpertId,
    Member,
    MemberId,
    MemberState,
    Placement,
    Replica,
    Role,
    View,
)


def worker(name: str, cell: int, state: MemberState = MemberState.ACTIVE) -> Member:
    return Member(id=MemberId(name, 1), role=Role.EXPERT_WORKER, state=state, cell=cell)


def gateway(name: str, cell: int) -> Member:
    return Member(
        id=MemberId(name, 1),
        role=Role.GATEWAY,
        state=MemberState.ACTIVE,
        cell=cell,
        stores=("s:1",),
    )


def view_of(members: list[Member], holders: dict[int, list[str]]) -> View:
    replicas = {
        ExpertId(0, expert): tuple(Replica(MemberId(name, 1), expert) for name in names)
        for expert, names in holders.items()
    }
    return View(1, 1, tuple(members), Placement("w", 1, len(holders), replicas))


def names(view: View) -> set[str]:
    return {m.id.name for m in view.with_role(Role.EXPERT_WORKER)}


WHOLE = {0: ["a", "c", "e"], 1: ["b", "d", "f"]}
SIX = [worker(name, cell) for cell, pair in enumerate(("ab", "cd", "ef")) for name in pair]


def test_a_cell_that_lacks_nothing_uses_its_own_workers_alone() -> None:
    view = view_of([gateway("g", 1), *SIX], WHOLE)

    assert names(view.within(1)) == {"c", "d"}
    assert view.within(1).placement.of(0, 0) == (Replica(MemberId("c", 1), 0),)
    assert view.within(None) is view


def test_where_there_is_one_cell_nothing_is_copied() -> None:
    view = view_of([gateway("g", 0), worker("a", 0), worker("s", NO_CELL)], {0: ["a"]})

    assert view.within(0) is view


def test_what_a_cell_has_lost_is_borrowed_from_the_next_and_nothing_else() -> None:
    view = view_of([gateway("g", 1), *(m for m in SIX if m.id.name != "d")], WHOLE)

    mine = view.within(1)

    assert names(mine) == {"c", "f"}
    assert mine.uncovered() == []
    assert mine.placement.held_by(MemberId("f", 1)) == {ExpertId(0, 1): 1}
    assert {g.id.name for g in view.callers_of(MemberId("f", 1))} == {"g"}
    assert view.callers_of(MemberId("b", 1)) == ()


def test_the_next_cell_is_passed_over_where_it_lacks_the_same() -> None:
    view = view_of([gateway("g", 1), *(m for m in SIX if m.id.name not in "df")], WHOLE)

    assert names(view.within(1)) == {"b", "c"}


def test_whoever_stands_by_is_known_in_every_cell() -> None:
    standby = worker("s", NO_CELL, MemberState.WARM)
    view = view_of([gateway("g", 0), gateway("h", 1), *SIX, standby], WHOLE)

    assert all("s" in names(view.within(cell)) for cell in range(3))
    assert len(view.callers_of(MemberId("s", 1))) == 2


@given(
    st.lists(st.tuples(st.integers(-1, 2), st.sampled_from(MemberState)), min_size=1, max_size=8),
    st.lists(st.sets(st.integers(0, 7), max_size=4), min_size=1, max_size=6),
)
def test_both_ends_agree_and_what_is_served_anywhere_is_served_everywhere(workers, holders) -> None:
    members = [worker(f"w{n}", cell, state) for n, (cell, state) in enumerate(workers)]
    gateways = [gateway(f"g{cell}", cell) for cell in range(-1, 3)]
    here = range(len(workers))
    view = view_of(
        [*gateways, *members],
        {e: [f"w{n}" for n in held if n in here] for e, held in enumerate(holders)},
    )
    for one in gateways:
        mine = view.within(one.cell)
        assert mine.uncovered() == view.uncovered()
        for member in view.with_role(Role.EXPERT_WORKER):
            calls = member.id.name in names(mine)
            assert calls == (one in view.callers_of(member.id))


@given(st.integers(0, 40), st.integers(1, 7))
def test_shares_are_even_and_come_to_the_whole(count: int, cells: int) -> None:
    shares = shares_of(count, cells)

    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1


def sizes(bench: Bench, role: Role = Role.EXPERT_WORKER) -> Counter[int]:
    return Counter(m.cell for m in bench.view.with_role(role) if m.state is MemberState.ACTIVE)


def whole(bench: Bench) -> bool:
    """Whether each cell serves every expert without another's help."""
    view = bench.view
    return all(
        view.placement.uncovered(m.id for m in view.serving_workers() if m.cell == cell) == []
        for cell in range(2)
    )


def test_every_cell_holds_every_expert_with_its_copies() -> None:
    bench = Bench(workers=5, gateways=3, floor=2, cells=2)
    bench.ticks(20)

    assert bench.controller.status().reasons == ()
    assert sizes(bench) == {0: 3, 1: 2}
    assert sizes(bench, Role.GATEWAY) == {0: 2, 1: 1}
    assert whole(bench)
    copies = [len(replicas) for replicas in bench.view.placement.replicas.values()]
    assert min(copies) >= 4


def test_a_dead_worker_is_replaced_in_its_own_cell() -> None:
    bench = Bench(workers=4, gateways=2, cells=2)
    bench.ticks(20)
    lost = next(m for m in bench.view.serving_workers() if m.cell == 1)

    bench.runtime.die(bench.runtime.named(lost.id.name)[0])
    bench.controller.tick()

    assert bench.view.uncovered() == []  # the other cell lends
    bench.ticks(30)
    assert sizes(bench) == {0: 2, 1: 2}
    assert whole(bench)


def test_a_standby_is_of_no_cell_until_one_calls_it_up() -> None:
    bench = Bench(workers=4, gateways=2, cells=2, standby=1)
    bench.ticks(20)
    (waiting,) = [m for m in bench.view.members if m.state is MemberState.WARM]
    assert waiting.cell == NO_CELL
    lost = next(m for m in bench.view.serving_workers() if m.cell == 1)

    bench.runtime.die(bench.runtime.named(lost.id.name)[0])
    bench.ticks(30)

    assert {m.id: m.cell for m in bench.view.members}[waiting.id] == 1
    assert whole(bench)


def test_fewer_workers_leave_the_fuller_cell_and_a_drain_is_made_even() -> None:
    bench = Bench(workers=6, gateways=2, cells=2)
    bench.ticks(20)

    bench.controller.scale(Role.EXPERT_WORKER, 5)
    bench.ticks(30)
    assert sizes(bench) == {0: 3, 1: 2}
    assert whole(bench)

    small = next(m for m in bench.view.serving_workers() if m.cell == 1)
    bench.controller.drain(small.id.name)
    bench.ticks(60)
    assert sizes(bench) == {0: 2, 1: 2}
    assert small.id not in {m.id for m in bench.view.members}
    assert whole(bench)


def test_a_new_controller_goes_on_with_the_same_cells() -> None:
    bench = Bench(workers=4, gateways=2, cells=2, standby=1)
    bench.ticks(20)
    before = {m.id: m.cell for m in bench.view.members}

    after = Bench(workers=4, gateways=2, cells=2, standby=1, after=bench)
    after.ticks(20)

    assert {m.id: m.cell for m in after.view.members} == before


@pytest.mark.parametrize(
    ("role", "count", "problem"),
    [
        (Role.GATEWAY, 1, "1 of role gateway: at least 1 must stay in each of 2 cells"),
        (Role.EXPERT_WORKER, 3, "1 expert workers of 6 slots in each of 2 cells cannot hold"),
        (
            Role.EXPERT_WORKER,
            9,
            "5 expert workers in each of 2 cells: a gateway rank has at most 4",
        ),
    ],
)
def test_what_a_cell_cannot_be_is_refused(role: Role, count: int, problem: str) -> None:
    bench = Bench(workers=4, gateways=2, cells=2, slots=6, max_workers=4)

    with pytest.raises(RefusedError, match=problem):
        bench.controller.scale(role, count)
