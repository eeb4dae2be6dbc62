"""The controller against a runtime without processes."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.control.controller import Controller
from cluster.control.options import ControllerOptions, Desired, RebalanceOptions
from cluster.control.ports import Opened, ProcessId, ProcessSpec, Pulse
from cluster.control.replicas import Fingerprints
from tests.fake_runtime import FakeClock, FakeRuntime, MemoryJournal
from workers.dispatch.tally import LoadReport
from workers.errors import NotFoundError, RefusedError
from workers.placement import ExpertId, MemberId, MemberState, Placement, Role

LAYERS, EXPERTS = 2, 6


def processes(role: Role, count: int):
    return lambda member: tuple(
        ProcessSpec(id=ProcessId(member, rank), role=role, body="m:C") for rank in range(count)
    )


def no_room(process: ProcessId) -> Opened:
    raise ValueError("no room")


class Bench:
    def __init__(
        self, workers=3, gateways=1, ranks=2, floor=1, journal=None, standby=0, warm=0, slots=16,
        after=None, settings="", rebalance=None, options=None, actuator=None,
        fixed=None, model=None, cells=1, max_workers=128, running=(),
    ) -> None:  # fmt: skip
        self.actuator = actuator
        self.runtime = after.runtime if after else FakeRuntime()
        self.clock = after.clock if after else FakeClock()
        if after:
            journal = MemoryJournal(after.journal)
        self.journal = journal or MemoryJournal()
        self.controller = Controller(
            Desired(
                members={
                    Role.EXPERT_WORKER: workers,
                    Role.GATEWAY: gateways,
                    Role.FRONT_DOOR: 1,
                },
                num_slots=slots,
                floor=floor,
                standby={Role.EXPERT_WORKER: standby, Role.GATEWAY: warm},
                settings=dict.fromkeys(Role, settings),
                fixed=fixed or {},
                cells=cells,
                max_workers=max_workers,
            ),
            model or Placement("w", LAYERS, EXPERTS),
            {
                Role.EXPERT_WORKER: processes(Role.EXPERT_WORKER, 1),
                Role.GATEWAY: processes(Role.GATEWAY, ranks),
                Role.FRONT_DOOR: processes(Role.FRONT_DOOR, 1),
            },
            runtime=self.runtime,
            journal=self.journal,
            clock=self.clock,
            options=options or ControllerOptions(rebalance=rebalance or RebalanceOptions()),
            actuator=actuator,
            resume=after is not None,
            running=running,
        )

    def ticks(self, count: int = 10) -> None:
        for _ in range(count):
            self.clock.advance_s(0.3)
            self.controller.tick()

    @property
    def view(self):
        return self.controller.view

    def loads(self, process) -> list[dict]:
        return [a[0] for p, m, a in self.runtime.calls if p == process and m == "load"]

    def workers(self) -> dict[str, MemberState]:
        members = self.view.with_role(Role.EXPERT_WORKER)
        return {m.id.name: m.state for m in members}


def test_a_cluster_forms_and_becomes_ready() -> None:
    bench = Bench()
    assert not bench.controller.status().ready

    bench.ticks()

    status = bench.controller.status()
    assert status.reasons == ()
    assert {m.state for m in bench.view.members} == {MemberState.ACTIVE}
    assert len(bench.view.members) == 5
    assert bench.view.uncovered() == []


def test_a_worker_has_the_slots_that_it_found_room_for() -> None:
    bench = Bench(workers=2, slots=4)
    large = "expert_worker-1"

    def opened(process: ProcessId) -> Opened:
        return Opened(pid=1, node="n", num_slots=10 if process.member.name == large else 4)

    bench.runtime.answers["open"] = opened
    bench.ticks()

    slots = {m.id.name: m.num_slots for m in bench.view.with_role(Role.EXPERT_WORKER)}
    assert slots == {"expert_worker-0": 4, large: 10}
    held = {m.id.name: len(bench.view.placement.held_by(m.id)) for m in bench.view.members}
    assert bench.view.uncovered() == []
    assert held["expert_worker-0"] <= 4 < held[large] <= 10

    with pytest.raises(RefusedError, match="1 expert workers with 4 slots together cannot hold"):
        bench.controller.drain(large)

    after = Bench(workers=2, slots=4, after=bench)
    after.ticks()
    assert {m.id.name: m.num_slots for m in after.view.with_role(Role.EXPERT_WORKER)} == slots


def test_every_rank_of_a_gateway_joins_at_the_rendezvous_of_rank_0_before_any_loads() -> None:
    bench = Bench(ranks=4)
    bench.ticks()

    order = [m for p, m, _ in bench.runtime.calls if p.member.name == "gateway-0"]
    assert order.index("load") > max(i for i, m in enumerate(order) if m == "join")
    assert order.count("join") == 4


def test_a_phase_waits_for_its_slowest_rank() -> None:
    bench = Bench()
    bench.controller.tick()
    slow = bench.runtime.named("gateway-0")[1]
    bench.runtime.mute.add((slow, "join"))

    bench.ticks()

    assert not [c for c in bench.runtime.calls if c[0].member == slow.member and c[1] == "load"]
    assert not bench.controller.status().ready


def test_workers_load_what_the_placement_gives_them_and_the_view_shows_only_what_is_loaded() -> (
    None
):
    bench = Bench()
    bench.ticks()

    loads = {p: a[0] for p, m, a in bench.runtime.calls if m == "load" and a}
    assert sum(len(a) for a in loads.values()) == LAYERS * EXPERTS
    for process, assignment in loads.items():
        assert assignment == bench.view.placement.held_by(process.member)
    for view in bench.journal.views:
        for replicas in view.placement.replicas.values():
            for replica in replicas:
                state = next(m.state for m in view.members if m.id == replica.worker)
                assert state in {MemberState.WARM, MemberState.ACTIVE, MemberState.DRAINING}


def test_a_dead_worker_leaves_the_view_at_once_and_a_new_incarnation_takes_its_experts() -> None:
    bench = Bench()
    bench.ticks()
    (victim,) = bench.runtime.named("expert_worker-1")
    lost = bench.view.placement.held_by(victim.member)

    bench.runtime.die(victim)
    bench.controller.tick()
    assert victim.member not in {m.id for m in bench.view.members}
    assert set(bench.view.uncovered()) == set(lost)

    bench.ticks()
    (successor,) = bench.runtime.named("expert_worker-1")
    assert successor.member.incarnation > victim.member.incarnation
    share = LAYERS * EXPERTS // 3
    assert len(bench.view.placement.held_by(successor.member)) >= share
    assert bench.view.uncovered() == []
    assert bench.controller.status().ready


def test_the_death_of_one_rank_is_the_end_of_its_gateway() -> None:
    bench = Bench(ranks=3)
    bench.ticks()
    old = bench.runtime.named("gateway-0")

    bench.runtime.die(old[2])
    bench.ticks()

    assert set(bench.runtime.killed) >= set(old[:2])
    new = bench.runtime.named("gateway-0")
    assert len(new) == 3
    assert new[0].member.incarnation > old[0].member.incarnation
    assert bench.controller.status().ready


def test_a_member_that_reports_a_failure_is_replaced() -> None:
    bench = Bench()
    bench.ticks()
    old = bench.runtime.named("gateway-0")
    bench.runtime.answers["pulse"] = lambda p: Pulse(
        ready=True, failure="broken" if p.member == old[0].member else ""
    )

    bench.ticks()

    assert bench.runtime.named("gateway-0")[0].member != old[0].member


def test_a_member_that_missed_a_view_gets_it_again() -> None:
    bench = Bench()
    bench.ticks()
    late = bench.runtime.named("gateway-0")[1]
    bench.runtime.answers["pulse"] = lambda p: Pulse(
        ready=True, order=(0, 0) if p == late else bench.view.order
    )
    bench.runtime.calls.clear()

    bench.ticks(5)

    adopted = [(p, a[0]) for p, m, a in bench.runtime.calls if m == "adopt"]
    assert adopted == [(late, bench.view)] * len(adopted)
    assert adopted


def test_starts_that_keep_failing_back_off_and_are_reported() -> None:
    bench = Bench()

    def fail(process):
        if process.member.name.startswith("gateway"):
            raise ValueError("no such file")

    bench.runtime.answers["load"] = fail
    bench.ticks(200)

    assert "no such file" in bench.controller.status().failure


def test_a_member_that_starts_after_all_ends_the_failure_of_those_before() -> None:
    bench = Bench(ranks=1)

    def fail(_process):
        raise ValueError("not mounted yet")

    works, bench.runtime.answers["start"] = bench.runtime.answers["start"], fail
    bench.ticks(200)
    assert "not mounted yet" in bench.controller.status().failure

    bench.runtime.answers["start"] = works
    bench.ticks(300)

    status = bench.controller.status()
    assert (status.failure, status.reasons, status.ready) == ("", (), True)
    tries = {
        p.member for p, m, _ in bench.runtime.calls if m == "load" and "gateway" in p.member.name
    }
    assert len(tries) < 10


def test_a_floor_of_two_puts_copies_on_distinct_workers() -> None:
    bench = Bench(floor=2)
    bench.ticks()

    for replicas in bench.view.placement.replicas.values():
        assert len({r.worker for r in replicas}) == 2


def test_stopping_drains_front_doors_first_and_leaves_nothing() -> None:
    bench = Bench()
    bench.ticks()
    bench.controller.stop()
    bench.ticks(20)

    drained = [p.member.name.rsplit("-", 1)[0] for p, m, _ in bench.runtime.calls if m == "drain"]
    assert list(dict.fromkeys(drained)) == ["frontdoor", "gateway", "expert_worker"]
    assert bench.controller.stopped
    assert bench.runtime.specs == {}


def test_stopping_while_members_start_ends_them() -> None:
    bench = Bench()
    bench.controller.tick()
    bench.controller.stop()
    bench.ticks(20)

    assert bench.controller.stopped
    assert bench.runtime.specs == {}


def test_a_superseded_controller_publishes_nothing_more() -> None:
    journal = MemoryJournal()
    old = Bench(journal=journal)
    old.ticks()
    before = old.view
    MemoryJournal(journal).claim_term()

    old.runtime.die(old.runtime.named("expert_worker-0")[0])
    old.ticks()

    assert old.view == before
    assert "superseded" in old.controller.status().failure


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_view_has_a_higher_version_than_the_one_before(workers: int) -> None:
    bench = Bench(workers=workers)
    bench.ticks()

    orders = [v.order for v in bench.journal.views]
    assert orders == sorted(set(orders))


def test_a_joining_worker_takes_its_share_and_nobody_is_asked_to_give_anything_up() -> None:
    bench = Bench(workers=3)
    bench.ticks()
    before = bench.view.placement

    assert bench.controller.scale(Role.EXPERT_WORKER, 4) == 3
    bench.ticks()

    (joined,) = bench.runtime.named("expert_worker-3")
    assert len(bench.view.placement.held_by(joined.member)) == LAYERS * (EXPERTS // 4)
    for expert, replicas in before.replicas.items():
        assert set(replicas) <= set(bench.view.placement.of(expert.layer, expert.expert))
    assert bench.controller.status().ready


def test_a_leaving_worker_serves_until_what_it_alone_holds_is_loaded_elsewhere() -> None:
    bench = Bench(workers=3)
    bench.ticks()
    start = len(bench.journal.views)
    (leaver,) = bench.runtime.named("expert_worker-1")
    others = bench.runtime.named("expert_worker-0") + bench.runtime.named("expert_worker-2")
    bench.runtime.mute |= {(p, "load") for p in others}

    assert bench.controller.drain("expert_worker-1") == leaver.member
    bench.ticks(30)
    assert bench.workers()["expert_worker-1"] is MemberState.ACTIVE
    assert not [c for c in bench.runtime.calls if c[:2] == (leaver, "drain")]

    bench.runtime.mute.clear()
    for process in others:
        bench.runtime.say(process, "load")
    bench.ticks()

    assert bench.workers() == dict.fromkeys(
        ("expert_worker-0", "expert_worker-2"), MemberState.ACTIVE
    )
    assert bench.controller.status().ready
    assert all(view.uncovered() == [] for view in bench.journal.views[start:])


@pytest.mark.parametrize("floor", [1, 2])
@pytest.mark.parametrize("path", [(4, 2, 5, 1), (1, 4, 3, 3, 1)])
def test_the_crew_walks_up_and_down_with_every_expert_covered_at_each_view(floor, path) -> None:
    bench = Bench(workers=3, floor=floor)
    bench.ticks()
    for count in path:
        bench.controller.scale(Role.EXPERT_WORKER, count)
        start = len(bench.journal.views)
        bench.ticks(25)
        assert len(bench.workers()) == count
        assert bench.controller.status().reasons == ()
        for view in bench.journal.views[start:]:
            assert view.uncovered() == []
        for replicas in bench.view.placement.replicas.values():
            assert len({r.worker for r in replicas}) >= min(floor, count)


def test_leaving_is_refused_when_the_rest_could_not_hold_every_expert() -> None:
    bench = Bench(workers=3, slots=5)
    bench.ticks()

    with pytest.raises(
        RefusedError, match="2 expert workers with 10 slots together cannot hold the 12"
    ):
        bench.controller.drain("expert_worker-1")
    with pytest.raises(RefusedError, match="coverage would break"):
        bench.controller.scale(Role.EXPERT_WORKER, 2)
    with pytest.raises(RefusedError, match="at least 1"):
        bench.controller.scale(Role.GATEWAY, 0)
    with pytest.raises(NotFoundError, match="nobody-7"):
        bench.controller.drain("nobody-7")

    bench.ticks()
    assert len(bench.workers()) == 3


def test_a_warm_gateway_has_its_weights_and_only_begins_to_listen_for_a_dead_one() -> None:
    bench = Bench(gateways=1, ranks=2, warm=1)
    bench.ticks()
    (pool,) = (p for p in bench.controller.status().pools if p.role is Role.GATEWAY)
    assert (pool.wanted, pool.serving, pool.standby) == (1, 1, 1)
    states = {m.id.name: m.state for m in bench.view.with_role(Role.GATEWAY)}
    assert states == {"gateway-0": MemberState.ACTIVE, "gateway-1": MemberState.WARM}
    warm = bench.runtime.named("gateway-1")
    assert not [c for c in bench.runtime.calls if c[0] in warm and c[1] == "start"]

    before = len(bench.runtime.calls)
    bench.runtime.die(bench.runtime.named("gateway-0")[1])
    bench.ticks(3)

    states = {m.id.name: m.state for m in bench.view.with_role(Role.GATEWAY)}
    assert states["gateway-1"] is MemberState.ACTIVE
    asked = [
        m for p, m, _ in bench.runtime.calls[before:] if p in warm and m not in {"adopt", "pulse"}
    ]
    assert asked == ["start", "start"]
    bench.ticks()
    assert {m.state for m in bench.view.with_role(Role.GATEWAY)} == {
        MemberState.ACTIVE,
        MemberState.WARM,
    }


def test_more_gateways_are_taken_from_the_warm_ones_first() -> None:
    bench = Bench(gateways=1, ranks=1, warm=1)
    bench.ticks()
    bench.controller.scale(Role.GATEWAY, 2)
    bench.ticks(3)
    states = {m.id.name: m.state for m in bench.view.with_role(Role.GATEWAY)}
    assert states["gateway-1"] is MemberState.ACTIVE


def test_a_standby_takes_the_place_of_a_dead_worker_without_a_start() -> None:
    bench = Bench(workers=3, standby=1, floor=2)
    bench.ticks()
    (standby,) = bench.runtime.named("expert_worker-3")
    assert bench.workers()["expert_worker-3"] is MemberState.WARM
    assert bench.loads(standby) == []

    bench.runtime.die(bench.runtime.named("expert_worker-0")[0])
    bench.controller.tick()

    assert bench.loads(standby)
    bench.ticks()
    assert bench.workers()["expert_worker-3"] is MemberState.ACTIVE
    assert bench.workers()["expert_worker-0"] is MemberState.WARM  # the new standby
    assert bench.controller.status().ready


def test_what_nobody_holds_any_more_is_loaded_before_the_replacement_is_there() -> None:
    bench = Bench(workers=3, floor=1)
    bench.ticks()
    (victim,) = bench.runtime.named("expert_worker-1")
    bench.runtime.mute.add((ProcessId(replace(victim.member, incarnation=1_000_002)), "open"))

    bench.runtime.die(victim)
    bench.ticks(3)

    assert bench.view.uncovered() == []
    assert len([s for s in bench.workers().values() if s is MemberState.ACTIVE]) == 2


def test_what_a_silent_worker_alone_holds_is_loaded_elsewhere_before_it_is_given_up() -> None:
    bench = Bench(workers=3, floor=1)
    bench.ticks()
    (frozen,) = bench.runtime.named("expert_worker-1")
    only = set(bench.view.placement.held_by(frozen.member))
    bench.runtime.mute.add((frozen, "pulse"))

    bench.ticks(20)
    status = bench.controller.status()
    assert any("silent" in reason for reason in status.reasons)
    assert frozen in bench.runtime.specs
    for expert in only:
        assert len(bench.view.placement.of(expert.layer, expert.expert)) > 1

    bench.ticks(60)
    assert frozen not in bench.runtime.specs
    assert bench.controller.status().ready


def test_a_silent_worker_whose_experts_nobody_else_has_room_for_is_kept_until_a_new_one_has() -> (
    None
):
    bench = Bench(workers=3, floor=1, slots=4)
    bench.ticks()
    (frozen,) = bench.runtime.named("expert_worker-1")
    bench.runtime.mute.add((frozen, "pulse"))
    bench.runtime.answers["open"] = no_room

    bench.ticks(100)
    assert frozen in bench.runtime.specs
    assert any("cannot hold" in reason for reason in bench.controller.status().reasons)

    bench.runtime.answers["open"] = FakeRuntime().answers["open"]
    bench.ticks(1000)
    assert frozen not in bench.runtime.specs
    assert bench.view.uncovered() == []
    assert bench.controller.status().ready


def test_a_silent_worker_that_is_heard_again_stays() -> None:
    bench = Bench(workers=3, floor=1, slots=4)
    bench.ticks()
    (frozen,) = bench.runtime.named("expert_worker-1")
    bench.runtime.mute.add((frozen, "pulse"))
    bench.runtime.answers["open"] = no_room
    bench.ticks(60)
    (status,) = [m for m in bench.controller.status().members if m.member.id == frozen.member]
    assert status.leaving

    bench.runtime.mute.clear()
    bench.runtime.say(frozen, "pulse", Pulse(ready=True))  # the one that it was asked for
    bench.ticks(20)
    (status,) = [m for m in bench.controller.status().members if m.member.id == frozen.member]
    assert not status.leaving
    assert bench.controller.status().ready


def test_a_worker_whose_load_never_ends_is_replaced_by_one_that_loads() -> None:
    options = ControllerOptions(phase_s=20.0)
    bench = Bench(workers=3, floor=1, options=options)
    bench.ticks()
    (stuck,) = bench.runtime.named("expert_worker-0")
    (dead,) = bench.runtime.named("expert_worker-1")
    bench.runtime.mute.add((stuck, "load"))  # it answers pulses meanwhile

    bench.runtime.die(dead)
    bench.ticks(40)
    assert bench.runtime.calls.count((stuck, "load", (bench.loads(stuck)[-1],))) == 1
    bench.ticks(200)

    assert stuck not in bench.runtime.specs
    assert bench.view.uncovered() == []
    assert bench.controller.status().ready


def test_a_controller_that_hears_hardly_anybody_takes_itself_for_the_one_that_is_cut_off() -> None:
    bench = Bench(workers=4, floor=2, ranks=1)
    bench.ticks()
    silent = [*bench.runtime.named("expert_worker-1"), *bench.runtime.named("gateway-0")]
    silent += bench.runtime.named("frontdoor-0")
    assert len(silent) == 3
    bench.runtime.mute |= {(process, "pulse") for process in silent}

    bench.ticks(100)

    assert set(silent) <= bench.runtime.specs.keys()
    assert any("cut off" in reason for reason in bench.controller.status().reasons)


def test_a_silent_gateway_is_replaced() -> None:
    bench = Bench(workers=4, floor=2, ranks=1)
    bench.ticks()
    (silent,) = bench.runtime.named("gateway-0")
    bench.runtime.mute.add((silent, "pulse"))

    bench.ticks(100)

    assert silent in bench.runtime.killed
    assert bench.controller.status().ready


def test_a_worker_on_a_draining_node_is_replaced_and_then_drained() -> None:
    bench = Bench(workers=2, floor=1)
    bench.ticks()
    (leaver,) = bench.runtime.named("expert_worker-0")
    start = len(bench.journal.views)

    bench.runtime.leave(leaver)
    bench.ticks(20)

    assert leaver not in bench.runtime.specs
    assert [c for c in bench.runtime.calls if c[:2] == (leaver, "drain")]
    assert len(bench.workers()) == 2
    assert all(view.uncovered() == [] for view in bench.journal.views[start:])


def test_a_gateway_that_leaves_drains_while_another_serves() -> None:
    bench = Bench(gateways=1)
    bench.ticks()
    bench.controller.scale(Role.GATEWAY, 2)
    bench.ticks()
    assert len(bench.view.with_role(Role.GATEWAY)) == 2

    bench.controller.scale(Role.GATEWAY, 1)
    bench.ticks()

    assert [m.id.name for m in bench.view.with_role(Role.GATEWAY)] == ["gateway-0"]
    drained = [p for p, m, _ in bench.runtime.calls if m == "drain"]
    assert {p.member.name for p in drained} == {"gateway-1"}


def test_who_is_drained_twice_is_told_so_and_a_name_that_nobody_has_is_another_matter() -> None:
    bench = Bench(gateways=2)
    bench.ticks()
    bench.controller.drain("gateway-1")
    with pytest.raises(NotFoundError, match="gateway-1 is leaving already"):
        bench.controller.drain("gateway-1")
    with pytest.raises(NotFoundError, match="no member gateway-9"):
        bench.controller.drain("gateway-9")


def test_a_new_controller_takes_over_all_that_serves_and_starts_nothing() -> None:
    bench = Bench(workers=3, standby=1, floor=2)
    bench.ticks()
    bench.controller.scale(Role.EXPERT_WORKER, 4)
    bench.ticks()
    before, specs = bench.view, set(bench.runtime.specs)

    successor = Bench(workers=3, standby=1, floor=2, after=bench)
    successor.ticks()

    assert set(successor.runtime.specs) == specs
    assert successor.view.order > before.order
    assert successor.view.members == before.members
    assert successor.view.placement == before.placement
    assert successor.controller.status().reasons == ()

    bench.controller.tick()
    assert bench.controller.superseded
    assert bench.view == before


def test_a_new_controller_hears_of_deaths_it_missed_and_of_starts_that_were_cut_short() -> None:
    bench = Bench(workers=3)
    bench.ticks()
    bench.controller.scale(Role.EXPERT_WORKER, 4)
    bench.controller.tick()
    bench.controller.tick()
    (half,) = bench.runtime.named("expert_worker-3")
    dead = bench.runtime.named("expert_worker-0")[0]
    bench.runtime.specs.pop(dead)

    successor = Bench(workers=3, after=bench)
    successor.ticks(20)

    assert half in successor.runtime.killed or half in successor.runtime.specs
    assert len(successor.workers()) == 4
    assert (
        successor.runtime.named("expert_worker-0")[0].member.incarnation > dead.member.incarnation
    )
    assert successor.controller.status().reasons == ()


def test_calls_of_a_superseded_controller_are_refused_by_members() -> None:
    bench = Bench(workers=2)
    bench.ticks()
    successor = Bench(workers=2, after=bench)
    successor.ticks()
    (process,) = bench.runtime.named("expert_worker-0")

    bench.runtime.call(process, bench.view.term, "drain")

    assert "superseded" in bench.runtime.poll()[-1].error


def test_a_lost_journal_is_noticed_by_the_members_word() -> None:
    bench = Bench(workers=2)
    bench.ticks()
    fresh = Bench(workers=2, after=bench)
    fresh.ticks()
    fresh.runtime.answers["pulse"] = lambda p: Pulse(ready=True, order=(40, 7))

    fresh.ticks(3)

    assert fresh.view.term > 40


def test_a_newcomer_that_computes_something_else_than_its_replicas_never_serves() -> None:
    bench = Bench(workers=2, floor=2)
    wrong = set()

    def load(process):
        (assignment,) = (a[0] for p, m, a in bench.runtime.calls[-1:] if m == "load" and a)
        return dict.fromkeys(assignment, (1.0, -0.5 if process in wrong else 0.5))

    bench.runtime.answers["load"] = lambda p: load(p) if "expert" in p.member.name else None
    bench.ticks()
    assert bench.controller.status().ready

    bench.controller.scale(Role.EXPERT_WORKER, 3)
    bench.controller.tick()
    (newcomer,) = bench.runtime.named("expert_worker-2")
    wrong.add(newcomer)
    bench.ticks()

    assert newcomer in bench.runtime.killed
    assert newcomer.member not in {m.id for m in bench.view.serving_workers()}
    wrong.clear()
    bench.ticks(40)
    assert bench.workers()["expert_worker-2"] is MemberState.ACTIVE


def test_a_process_that_never_adopts_the_newest_view_makes_the_cluster_unready() -> None:
    bench = Bench(workers=2)
    bench.ticks()
    (deaf,) = bench.runtime.named("frontdoor-0")
    bench.runtime.mute.add((deaf, "adopt"))
    bench.controller.scale(Role.EXPERT_WORKER, 3)

    bench.ticks(130)

    assert any("not adopted" in reason for reason in bench.controller.status().reasons)


def hot_report(num_layers: int = LAYERS) -> LoadReport:
    """Experts 0 and 3 of each layer are asked for by every batch, the others hardly ever."""
    counts = np.tile(np.array([100, 0, 0, 100, 0, 0], dtype=np.uint32), (num_layers, 1))
    calls = np.full(num_layers, 100, dtype=np.uint32)
    return LoadReport(tuple(range(num_layers)), calls, counts, counts)


def rebalancing(**more) -> Bench:
    """A cluster whose gateways report that load from the start."""
    bench = Bench(rebalance=RebalanceOptions(period_s=2.0), **more)
    plain = bench.runtime.answers["pulse"]
    bench.runtime.answers["pulse"] = lambda p: replace(
        plain(p), load=hot_report() if "gateway" in p.member.name else None
    )
    return bench


def test_hot_experts_are_given_further_copies_and_nothing_is_ever_uncovered() -> None:
    bench = rebalancing(slots=6)
    bench.ticks(60)

    status = bench.controller.status()
    assert status.ready
    assert status.last_rebalance is not None
    assert status.last_rebalance.count >= 1
    assert status.replicas_moving == 0
    for layer in range(LAYERS):
        holders = [{r.worker for r in bench.view.placement.of(layer, e)} for e in (0, 3)]
        assert len(holders[0] | holders[1]) > 1
    formed = False
    for view in bench.journal.views:
        formed = formed or not view.uncovered()
        assert not formed or not view.uncovered()


def test_a_rebalanced_cluster_comes_to_rest() -> None:
    bench = rebalancing(slots=6)
    bench.ticks(100)
    count = bench.controller.status().last_rebalance.count
    loads = sum(m == "load" for _, m, _ in bench.runtime.calls)

    bench.ticks(100)

    assert bench.controller.status().last_rebalance.count == count
    assert sum(m == "load" for _, m, _ in bench.runtime.calls) == loads


def test_a_drain_is_not_held_up_by_moves_and_moves_wait_for_it() -> None:
    bench = rebalancing(slots=12)
    bench.ticks(30)

    bench.controller.drain("expert_worker-1")
    bench.ticks(40)

    assert "expert_worker-1" not in bench.workers()
    assert bench.controller.status().ready


def test_the_load_is_not_kept_with_the_pulse() -> None:
    bench = rebalancing()
    bench.ticks(20)

    pulses = [p for m in bench.controller.status().members for p in m.pulses]
    assert pulses
    assert all(pulse.load is None for pulse in pulses)


def test_a_journal_of_another_model_is_not_gone_on_from() -> None:
    bench = Bench()
    bench.ticks()
    bench.controller.stop()
    bench.ticks(20)
    assert bench.controller.stopped
    other = Bench(after=bench, model=Placement("another", LAYERS, EXPERTS))
    other.ticks()
    assert other.controller.status().ready
    assert other.view.placement.weights_version == "another"


def test_a_controller_without_a_journal_begins_nothing_beside_what_runs() -> None:
    bench = Bench(running=["gateway-0.1000001", "expert-0.1000001"])
    bench.ticks()

    assert not bench.runtime.calls
    assert not bench.journal.views
    failure = bench.controller.status().failure
    assert "2 processes of a cluster run here: expert-0.1000001, gateway-0.1000001" in failure


def test_what_is_asked_of_a_controller_that_refuses_leaves_the_journal_as_it_was() -> None:
    bench = Bench(running=["gateway-0.1000001"])
    for ask in (
        lambda: bench.controller.scale(Role.GATEWAY, 2),
        lambda: bench.controller.drain("gateway-0"),
        bench.controller.rollout,
    ):
        with pytest.raises(RefusedError, match="the journal knows no member"):
            ask()
    assert bench.controller.status().refuses
    assert not bench.journal.views


def test_a_record_without_members_is_no_leave_to_start_them_a_second_time() -> None:
    bench = Bench()
    bench.ticks()
    bench.controller.stop()
    bench.ticks(20)
    for model in (None, Placement("another", LAYERS, EXPERTS)):
        other = Bench(after=bench, model=model, running=["gateway-0.1000001"])
        assert other.controller.status().refuses


def test_no_death_is_missed_where_the_journal_fails_as_members_know_a_higher_term(
    monkeypatch,
) -> None:
    bench = Bench(gateways=2)
    bench.ticks()
    dead, gateway = bench.runtime.named("expert_worker-0")[0], bench.runtime.named("gateway-0")[0]
    bench.runtime.say(gateway, "pulse", Pulse(ready=True, order=(99, 1)))
    bench.runtime.die(dead)

    def fail(above: int) -> int:
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(bench.journal, "claim_term", fail)
        bench.ticks(1)
        assert "the journal cannot be used" in "".join(bench.controller.status().reasons)
    bench.ticks()

    assert dead.member not in {member.id for member in bench.view.members}
    assert bench.view.term > 99


def test_what_a_worker_that_has_left_computed_is_held_against_nobody() -> None:
    fingerprints, wrong, right = Fingerprints(), MemberId("w0", 1), MemberId("w1", 1)
    expert = ExpertId(0, 0)
    assert not fingerprints.compare(wrong, {expert: (1.0,)})
    assert "than its replica on w0.1 does" in fingerprints.compare(right, {expert: (2.0,)})
    fingerprints.forget(wrong)
    assert not fingerprints.compare(right, {expert: (2.0,)})

    assert not fingerprints.compare(MemberId("w2", 1), {expert: (2.0,)})
    fingerprints.forget(right)
    assert "than its replica on w2.1 does" in fingerprints.compare(wrong, {expert: (1.0,)})


@pytest.mark.parametrize(
    "different",
    [
        {"model": Placement("another", LAYERS, EXPERTS)},
        {"fixed": {"dispatch.bit_stable": "True"}},
        {"fixed": {"dispatch.bit_stable": "False", "control.cells": "2"}},
    ],
    ids=["model", "setting", "cells"],
)
def test_members_of_another_cluster_are_left_alone_and_the_reason_is_told(different) -> None:
    bench = Bench(fixed={"dispatch.bit_stable": "False"})
    bench.ticks()
    other = Bench(after=bench, **{"fixed": {"dispatch.bit_stable": "False"}, **different})
    calls = len(bench.runtime.calls)
    other.ticks()
    assert len(bench.runtime.calls) == calls
    assert "which cannot take this on" in other.controller.status().failure
    assert other.journal.views[-1] == bench.view

    back = Bench(after=bench, fixed={"dispatch.bit_stable": "False"})
    back.ticks()
    assert back.controller.status().ready
