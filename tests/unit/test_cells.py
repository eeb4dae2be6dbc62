"""Cells: who calls whom, what is borrowed, and that each cell stays whole by itself."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.ports import ProcessId
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
        if one.cell == NO_CELL:
            assert {m.cell for m in mine.with_role(Role.EXPERT_WORKER)} <= {NO_CELL}
        else:
            assert mine.uncovered() == view.uncovered()
        for member in view.with_role(Role.EXPERT_WORKER):
            calls = member.id.name in names(mine)
            assert calls == (one in view.callers_of(member.id))


@given(st.integers(0, 40), st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_shares_are_even_come_to_the_whole_and_leave_the_largest_cells_most(count, sizes) -> None:
    shares = shares_of(count, sizes)

    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1
    pairs = list(zip(sizes, shares, strict=True))
    assert all(a >= b for n, a in pairs for m, b in pairs if n > m)


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

    assert bench.view.within(1).uncovered() == []  # the other cell lends
    (other,) = [m for m in bench.view.with_role(Role.GATEWAY) if m.cell == 1]
    lenders = [m for m in bench.view.serving_workers() if m.cell == 0]
    assert any(other in bench.view.callers_of(m.id) for m in lenders)
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


@pytest.mark.parametrize("role", [Role.EXPERT_WORKER, Role.GATEWAY])
@pytest.mark.parametrize("cell", [0, 1])
def test_a_drained_member_is_not_replaced_and_nobody_else_moves(role: Role, cell: int) -> None:
    bench = Bench(workers=6, gateways=4, cells=2)
    bench.ticks(20)
    before = {m.id for m in bench.view.members}
    drained = next(m for m in bench.view.with_role(role) if m.cell == cell)

    bench.controller.drain(drained.id.name)
    bench.ticks(30)

    assert {m.id for m in bench.view.members} == before - {drained.id}
    assert whole(bench)


def test_cells_that_drains_left_uneven_are_made_even_without_room_for_one_more() -> None:
    bench = Bench(workers=6, gateways=2, cells=2)
    bench.ticks(20)
    first, second = [m for m in bench.view.serving_workers() if m.cell == 1][:2]

    bench.controller.drain(first.id.name)
    bench.controller.drain(second.id.name)
    bench.ticks(10)
    gone = {m.id for m in bench.view.members}
    assert first.id not in gone or second.id not in gone  # one place is free for a successor
    bench.ticks(60)

    assert sizes(bench) == {0: 2, 1: 2}
    assert whole(bench)


def test_a_cell_whose_workers_have_all_died_does_not_wait_for_the_last_successor() -> None:
    bench = Bench(workers=4, gateways=2, cells=2)
    bench.ticks(20)
    lost = [m for m in bench.view.serving_workers() if m.cell == 1]
    for member in lost:
        bench.runtime.die(bench.runtime.named(member.id.name)[0])
    stuck = MemberId(lost[0].id.name, lost[0].id.incarnation + 1)
    bench.runtime.mute.add((ProcessId(stuck), "open"))

    bench.ticks(20)
    assert bench.controller.status().rebalancing_s > 0
    bench.ticks(120)

    assert sizes(bench) == {0: 2, 1: 1}
    assert whole(bench)


def test_a_cell_drains_while_another_still_loads() -> None:
    bench = Bench(workers=6, gateways=2, cells=2)
    bench.ticks(20)
    loading = next(m for m in bench.view.serving_workers() if m.cell == 0)
    bench.runtime.die(bench.runtime.named(loading.id.name)[0])
    bench.controller.tick()
    for process in list(bench.runtime.specs):
        bench.runtime.mute.add((process, "load"))  # nobody finishes a load any more
    leaving = next(m for m in bench.view.serving_workers() if m.cell == 1)
    for process in bench.runtime.specs:
        cell = bench.view.cell_of(process.member)
        if cell == 1:
            bench.runtime.mute.discard((process, "load"))

    bench.controller.drain(leaving.id.name)
    bench.ticks(60)

    assert leaving.id not in {m.id for m in bench.view.members}


def test_fewer_workers_leave_the_fuller_cell() -> None:
    bench = Bench(workers=5, gateways=2, cells=2)
    bench.ticks(20)

    bench.controller.scale(Role.EXPERT_WORKER, 4)
    bench.ticks(30)

    assert sizes(bench) == {0: 2, 1: 2}
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
        (Role.GATEWAY, 1, "1 gateways: at least 1 must stay in each of 2 cells"),
        (
            Role.EXPERT_WORKER,
            3,
            "1 expert workers with 6 slots together in each of 2 cells cannot hold",
        ),
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
