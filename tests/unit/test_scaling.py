"""Numbers of members that follow load: policies, patience, trend, and the controller that acts."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.lifecycle import Life, Phase
from cluster.control.node_demand import NodeDemand
from cluster.control.options import (
    ControllerOptions,
    ExpertScaling,
    GatewayScaling,
    PoolScaling,
    ScalingOptions,
)
from cluster.control.ports import NodeNeed, Pulse
from cluster.control.scaling.policy import Appraisal, appraise_experts, appraise_gateways
from cluster.control.scaling.pool import PoolScaler
from cluster.control.scaling.signals import (
    ExpertSignals,
    GatewaySignals,
    expert_signals,
    gateway_signals,
)
from cluster.control.scaling.trend import Trend
from tests.bench.bench_autoscaler import draw_day, policy, static_peak
from tests.bench.bench_autoscaler import run as run_day
from tests.unit.test_controller import Bench
from workers.errors import RefusedError
from workers.placement import MemberState, Role
from workers.types import GatewayStats, WorkerStats

EXPERTS = ExpertScaling(max=16)
GATEWAYS = GatewayScaling(max=8)


def appraise(growth: float = 1.0, **signals) -> Appraisal:
    return appraise_experts(ExpertSignals(**signals), EXPERTS, growth)


def test_as_many_workers_are_enough_as_bring_each_to_its_target() -> None:
    assert appraise(serving=4, busy=2.4, busiest=0.6).enough == 4
    assert appraise(serving=4, busy=3.2, busiest=0.8).enough == math.ceil(3.2 / 0.6)
    assert "80 % (target 60 %)" in appraise(serving=4, busy=3.2, busiest=0.8).why


def test_a_worker_leaves_only_if_the_rest_stay_well_below_the_target() -> None:
    seen = appraise(serving=4, busy=1.75, busiest=0.5)
    assert seen.enough == 3
    assert seen.least == 4


def test_a_call_that_waits_asks_for_more_workers_however_little_they_compute() -> None:
    seen = appraise(serving=8, busy=1.0, busiest=0.3, queue_age_s=0.5)
    assert (seen.enough, seen.least) == (10, 10)
    assert seen.why.startswith("a call waited for 500 ms")


def test_gateways_that_wait_for_idle_workers_are_not_helped_by_more_of_them() -> None:
    assert appraise(serving=4, busy=0.4, busiest=0.1, waiting=0.9).enough == 1
    assert appraise(serving=4, busy=2.0, busiest=0.7, waiting=0.9).enough == 5


def test_a_load_that_grows_is_met_before_it_is_there() -> None:
    seen = appraise(serving=4, busy=2.4, busiest=0.6, growth=1.5)
    assert seen.enough == 6
    assert "150 %" in seen.why


def test_gateways_follow_memory_waiting_sequences_and_the_time_of_a_step() -> None:
    def enough(options: GatewayScaling = GATEWAYS, **signals) -> int:
        return appraise_gateways(GatewaySignals(serving=2, **signals), options, 1.0).enough

    assert enough(memory=1.4) == 2
    assert enough(memory=1.5) == 3
    assert enough(memory=0.2, waiting=3) == 3
    assert enough(memory=0.2, step_s=0.2) == 1
    assert enough(memory=0.2, step_s=0.2, options=replace(GATEWAYS, step_s=0.1)) == 3


@given(
    busy=st.floats(0, 16),
    serving=st.integers(1, 16),
    more=st.floats(0, 4),
    queue_age_s=st.floats(0, 1),
    growth=st.floats(1, 2),
)
def test_more_load_never_needs_fewer_and_nobody_leaves_for_whom_there_is_work(
    busy: float, serving: int, more: float, queue_age_s: float, growth: float
) -> None:
    signals = ExpertSignals(serving=serving, busy=busy, busiest=1, queue_age_s=queue_age_s)
    seen = appraise_experts(signals, EXPERTS, growth)
    heavier = appraise_experts(replace(signals, busy=busy + more), EXPERTS, growth)
    assert heavier.enough >= seen.enough
    assert heavier.least >= seen.least
    assert seen.least >= min(seen.enough, serving)
    assert seen.least >= busy * growth


class Pool:
    """A pool whose members come as soon as they are wanted, unless it is told otherwise."""

    def __init__(self, wanted: int = 4, **options) -> None:
        options = {"min": 2, "max": 12, "up_s": 2.0, "down_s": 60.0, **options}
        self.scaler = PoolScaler(PoolScaling(**options))
        self.wanted, self.now_s = wanted, 1000.0
        self.serving: int | None = None

    def see(
        self, enough: int, for_s: float, least: int | None = None, fewest: int = 1
    ) -> list[int]:
        """Have the same be needed for a while; returns each new wanted number."""
        changes = []
        end_s = self.now_s + for_s
        while self.now_s < end_s:
            self.now_s += 1.0
            change = self.scaler.decide(
                Appraisal(enough=enough, least=enough if least is None else least, why="load"),
                wanted=self.wanted,
                serving=self.wanted if self.serving is None else self.serving,
                fewest=fewest,
                now_s=self.now_s,
            )
            if change is not None:
                assert change.before == self.wanted
                self.wanted = change.after
                changes.append(change.after)
        return changes


def test_a_short_peak_changes_nothing_and_a_lasting_one_does() -> None:
    pool = Pool()
    assert pool.see(6, for_s=2) == []
    assert pool.see(4, for_s=1) == []
    assert pool.see(6, for_s=2) == []
    assert pool.see(6, for_s=2) == [6]


def test_growth_stops_at_twice_those_that_serve_and_at_the_bound() -> None:
    pool = Pool()
    pool.serving = 4
    assert pool.see(30, for_s=20) == [8]
    pool.serving = 8
    assert pool.see(30, for_s=20) == [12]


def test_members_leave_one_by_one_and_late() -> None:
    pool = Pool(wanted=6)
    assert pool.see(3, for_s=60) == []
    assert pool.see(3, for_s=2) == [5]
    assert pool.see(3, for_s=59) == []
    assert pool.see(3, for_s=200) == [4, 3]


def test_of_many_members_a_tenth_leaves_at_once() -> None:
    pool = Pool(wanted=40, max=40)
    assert pool.see(10, for_s=62) == [36]


def test_a_peak_in_the_time_of_patience_holds_members_for_that_time() -> None:
    pool = Pool(wanted=6)
    pool.see(3, for_s=50)
    assert pool.see(5, for_s=5) == []
    assert pool.see(3, for_s=10) == [5]  # and not 4: five were needed a moment ago
    assert pool.see(3, for_s=65) == [4]


def test_nobody_leaves_while_members_are_missing() -> None:
    pool = Pool(wanted=6)
    pool.serving = 5
    assert pool.see(3, for_s=200) == []


def test_never_fewer_than_hold_every_expert_whatever_the_bounds() -> None:
    pool = Pool(wanted=6)
    assert pool.see(1, for_s=1000, fewest=4) == [5, 4]
    assert Pool(wanted=3).see(1, for_s=1, fewest=4) == [4]
    assert Pool(wanted=20).see(20, for_s=1) == [12]


def test_an_operators_number_within_the_bounds_is_left_for_the_time_of_patience() -> None:
    pool = Pool(wanted=4)
    pool.see(4, for_s=100)
    pool.wanted = 8
    assert pool.see(4, for_s=60) == []
    assert pool.see(4, for_s=2) == [7]


@settings(deadline=None)
@given(
    enough=st.lists(st.integers(0, 40), min_size=1, max_size=200),
    wanted=st.integers(1, 40),
    low=st.integers(1, 5),
    high=st.integers(5, 20),
)
def test_the_number_stays_within_its_bounds_and_settles(
    enough: list[int], wanted: int, low: int, high: int
) -> None:
    pool = Pool(wanted=wanted, min=low, max=high, down_s=5.0)
    for number in enough:
        pool.see(number, for_s=1)
        assert low <= pool.wanted <= high
    pool.see(enough[-1], for_s=1000)
    assert pool.wanted == min(max(enough[-1], low), high)
    assert pool.see(enough[-1], for_s=100) == []


def follow(rates: list[float], *, every_s: float = 1.0, ahead_s: float = 20.0) -> Trend:
    trend, count = Trend(ahead_s), 0.0
    for i, rate in enumerate(rates):
        count += rate * every_s
        trend.note({"gateway-0.1": int(count)}, i * every_s)
    return trend


def test_a_steady_rate_does_not_grow_and_a_rising_one_does() -> None:
    assert follow([100.0] * 60).growth == pytest.approx(1.0, abs=0.02)
    rising = [100.0 + 5 * i for i in range(100)]
    assert follow(rising).growth == pytest.approx(1 + 5 * 20 / 595, abs=0.1)
    assert follow(rising[::-1]).growth == 1.0
    assert follow(rising, ahead_s=0.0).growth == 1.0
    assert follow([10.0 * 1.2**i for i in range(60)]).growth > 1.5
    assert follow([10.0 * 1.5**i for i in range(60)]).growth <= 2.0


def test_noise_is_no_growth_however_far_ahead_is_looked() -> None:
    noise = np.random.default_rng(0).poisson(20, 600).astype(float).tolist()
    assert follow(noise, ahead_s=240.0).growth < 1.15


def test_a_gateway_that_joins_or_leaves_is_no_growth() -> None:
    trend = Trend(20.0)
    for i in range(60):
        counts = {"gateway-0.1": 100 * i}
        if i >= 30:
            counts["gateway-1.1"] = 1_000_000
        trend.note(counts, float(i))
    assert trend.growth == pytest.approx(1.0, abs=0.02)


def test_the_first_word_says_nothing_of_growth() -> None:
    assert Trend(10.0).growth == 1.0
    assert follow([5000.0]).growth == 1.0


def worked(bench: Bench, busy: float, queue_age_s: float = 0.0) -> None:
    """Have every worker tell, from now on, that it computes for this share of the time."""

    def pulse(process) -> Pulse:
        now_s = bench.clock.now_s()
        stats: object = None
        if process.member.name.startswith("expert"):
            stats = WorkerStats(compute_s=busy * now_s, queue_age_s=queue_age_s)
        if process.member.name.startswith("gateway"):
            stats = GatewayStats(steps=int(now_s), step_s=now_s, state_blocks_total=10)
        return Pulse(ready=True, order=bench.runtime.adopted.get(process, (0, 0)), stats=stats)

    bench.runtime.answers["pulse"] = pulse


class Nodes(NodeDemand):
    """Writes down what it is asked for."""

    def __init__(self) -> None:
        self.needs: dict[Role, NodeNeed] = {}
        self.wrong = ""

    def provide(self, needs) -> None:
        self.needs = {need.role: need for need in needs}

    def trouble(self) -> str:
        return self.wrong


def scaled_bench(**more) -> Bench:
    scaling = ScalingOptions(experts=ExpertScaling(min=2, max=6, up_s=1.0, down_s=20.0))
    return Bench(options=ControllerOptions(scaling=scaling), actuator=Nodes(), **more)


def serving(bench: Bench) -> int:
    return sum(state is MemberState.ACTIVE for state in bench.workers().values())


def test_the_controller_adds_workers_under_load_and_lets_them_go_after_it() -> None:
    bench = scaled_bench(workers=3)
    worked(bench, 0.5)
    bench.ticks(60)
    assert serving(bench) == 3
    assert bench.controller.status().scaled == ()

    worked(bench, 0.9)
    bench.ticks(200)
    assert serving(bench) == 6
    status = bench.controller.status()
    age_s, change = status.scaled[0]
    assert (change.role, change.before) == (Role.EXPERT_WORKER, 3)
    assert age_s > 0
    assert "workers are busy" in change.why
    (pool,) = status.scales
    assert (pool.role, pool.min, pool.max) == (Role.EXPERT_WORKER, 2, 6)

    worked(bench, 0.05)
    bench.ticks(1000)
    assert serving(bench) == 2
    assert bench.view.uncovered() == []
    assert bench.controller.status().ready


def test_the_controller_never_goes_below_what_holds_the_wanted_copies() -> None:
    bench = scaled_bench(workers=4, floor=2, slots=8)  # 12 experts, twice: 3 workers of 8 slots
    worked(bench, 0.0)
    bench.ticks(1500)
    assert serving(bench) == 3
    assert bench.view.uncovered() == []


def test_gateways_are_left_alone_where_only_experts_follow_load() -> None:
    bench = scaled_bench(workers=3)
    worked(bench, 0.9)
    bench.ticks(200)
    assert len(bench.view.with_role(Role.GATEWAY)) == 1


def test_nodes_are_asked_for_what_is_wanted_and_told_where_members_are() -> None:
    bench = scaled_bench(workers=3, standby=1)
    bench.controller.tick()
    need = bench.actuator.needs[Role.EXPERT_WORKER]
    assert (need.count, need.nodes, need.num_unplaced) == (4, frozenset(), 4)
    bench.ticks()
    need = bench.actuator.needs[Role.EXPERT_WORKER]
    assert (need.count, need.nodes, need.num_unplaced) == (4, frozenset({"node"}), 0)
    assert bench.actuator.needs[Role.GATEWAY].count == 1


def test_nodes_that_do_not_come_are_a_reason_not_to_be_ready() -> None:
    bench = scaled_bench(workers=3)
    bench.ticks()
    bench.actuator.wrong = "group expert has at most 2"
    assert "nodes: group expert has at most 2" in bench.controller.status().reasons


def test_a_controller_that_takes_over_goes_on_with_the_number_that_load_wanted() -> None:
    bench = scaled_bench(workers=3)
    worked(bench, 0.9)
    bench.ticks(200)
    after = scaled_bench(workers=3, after=bench)
    after.ticks(20)
    assert serving(after) == 6


def test_signals_come_from_members_that_serve_and_stay() -> None:
    bench = scaled_bench(workers=3)
    worked(bench, 0.6)
    bench.ticks(150)
    lives: list[Life] = list(bench.controller._lives.values())
    assert expert_signals(lives).serving == 3
    assert expert_signals(lives).busy == pytest.approx(1.8, abs=0.1)
    next(w for w in lives if w.role is Role.EXPERT_WORKER).leaving = True
    assert expert_signals(lives).serving == 2
    assert gateway_signals(lives).serving == 1
    assert gateway_signals([w for w in lives if w.phase is not Phase.SERVE]).serving == 0


def test_a_morning_of_load_is_met_with_fewer_worker_hours_than_its_peak_takes() -> None:
    morning = draw_day(seed=3, hours=(5, 9))
    options = ExpertScaling(min=16, max=96, down_s=600.0, queue_s=0.0005)
    number, static = static_peak(morning, most_late=0.001)
    followed = run_day(morning, policy(options), 20)
    assert followed.late < 0.01
    assert followed.worker_hours < 0.9 * static.worker_hours
    assert followed.most <= 2 * number


def test_an_operator_cannot_set_what_load_would_change_back_at_once() -> None:
    bench = scaled_bench(workers=3)
    bench.ticks()
    with pytest.raises(RefusedError, match="between 2 and 6"):
        bench.controller.scale(Role.EXPERT_WORKER, 7)
    bench.controller.scale(Role.EXPERT_WORKER, 2)
    with pytest.raises(RefusedError, match=r"autoscaler\.experts\.min"):
        bench.controller.drain("expert_worker-0")
    bench.controller.scale(Role.GATEWAY, 2)
