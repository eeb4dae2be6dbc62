"""The controller against a runtime without processes."""

import pytest

from cluster.control.controller import Controller, ControllerOptions, Desired
from cluster.control.ports import ProcessId, ProcessSpec, Pulse
from tests.fake_runtime import FakeClock, FakeRuntime, MemoryJournal
from workers.placement import MemberState, Placement, Role

LAYERS, EXPERTS = 2, 6


def processes(role: Role, count: int):
    return lambda member: tuple(
        ProcessSpec(id=ProcessId(member, rank), role=role, body="m:C") for rank in range(count)
    )


class Bench:
    def __init__(self, workers=3, gateways=1, ranks=2, floor=1, journal=None) -> None:
        self.runtime, self.clock = FakeRuntime(), FakeClock()
        self.journal = journal or MemoryJournal()
        self.controller = Controller(
            Desired(
                members={
                    Role.EXPERT_WORKER: workers,
                    Role.GATEWAY: gateways,
                    Role.FRONT_DOOR: 1,
                },
                num_slots=16,
                floor=floor,
            ),
            Placement("w", LAYERS, EXPERTS),
            {
                Role.EXPERT_WORKER: processes(Role.EXPERT_WORKER, 1),
                Role.GATEWAY: processes(Role.GATEWAY, ranks),
                Role.FRONT_DOOR: processes(Role.FRONT_DOOR, 1),
            },
            runtime=self.runtime,
            journal=self.journal,
            clock=self.clock,
            options=ControllerOptions(),
        )

    def ticks(self, count: int = 10) -> None:
        for _ in range(count):
            self.clock.advance_s(0.3)
            self.controller.tick()

    @property
    def view(self):
        return self.controller.view


def test_a_cluster_forms_and_becomes_ready() -> None:
    bench = Bench()
    assert not bench.controller.status().ready

    bench.ticks()

    status = bench.controller.status()
    assert status.reasons == ()
    assert {m.state for m in bench.view.members} == {MemberState.ACTIVE}
    assert len(bench.view.members) == 5
    assert bench.view.uncovered() == []


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
    assert set(bench.view.placement.held_by(successor.member)) == set(lost)
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
    journal.claim_term()

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
