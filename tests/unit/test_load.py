"""Statistics of load: what gateways count and report, and what the controller makes of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.options import RebalanceOptions
from cluster.control.placing.rebalance import Rebalancer
from cluster.control.placing.trace import RoutingTrace, activation_of
from cluster.control.placing.window import LoadWindow
from cluster.control.planner import Seat
from cluster.control.shares import ShareWindow
from workers.dispatch.tally import LoadReport, LoadTally
from workers.errors import TraceError
from workers.placement import ExpertId, MemberId, Placement
from workers.types import GatewayStats, WorkerStats


def ids(*rows) -> np.ndarray:
    return np.array(rows, dtype=np.int32)


def test_rows_and_activations_are_counted_and_blanks_are_not() -> None:
    tally = LoadTally()
    tally.count(0, ids([0, 2], [2, -1]), 4)
    tally.count(0, ids([2, 3]), 4)

    report = tally.take()

    assert report.layers == (0,)
    assert report.calls_N.tolist() == [2]
    assert report.rows_NE.tolist() == [[1, 0, 3, 1]]
    assert report.activated_NE.tolist() == [[1, 0, 2, 1]]
    assert tally.take() is None


def test_before_a_view_nothing_is_counted() -> None:
    tally = LoadTally()
    tally.count(0, ids([0, 2]), 0)

    assert tally.take() is None


@settings(derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), max_size=40), st.integers(1, 400))
def test_reports_are_bounded_take_turns_and_lose_nothing(calls, max_bytes) -> None:
    tally, rows_LE, seen = LoadTally(), np.zeros((10, 8)), []
    for layer, expert in calls:
        tally.count(layer, ids([expert]), 8)
    while (report := tally.take(max_bytes)) is not None:
        assert report.num_bytes <= max_bytes or len(report.layers) == 1
        seen += report.layers
        rows_LE[list(report.layers)] += report.rows_NE

    assert sorted(seen) == sorted({layer for layer, _ in calls})
    for layer, expert in calls:
        rows_LE[layer, expert] -= 1
    assert not rows_LE.any()


def test_all_layers_get_their_turn_while_counting_goes_on() -> None:
    tally, seen = LoadTally(), set()
    for _ in range(4):
        for layer in range(8):
            tally.count(layer, ids([0]), 8)
        seen.update(tally.take(2 * (4 + 8 * 8)).layers)

    assert seen == set(range(8))


def report(calls: int, activated: list[int], layer: int = 0) -> LoadReport:
    counts = np.array([activated], dtype=np.uint32)
    return LoadReport((layer,), np.array([calls], dtype=np.uint32), counts, counts)


def test_what_lies_a_half_life_back_counts_half() -> None:
    window = LoadWindow(1, 2, half_life_s=10.0)
    window.add(report(100, [100, 0]), 0.0)
    window.add(report(50, [0, 50]), 10.0)

    assert window.rows_LE.tolist() == [[50.0, 50.0]]
    assert window.activation_LE()[0] == pytest.approx([0.5, 0.5])


def test_a_window_has_seen_what_every_layer_was_lately_asked() -> None:
    window = LoadWindow(2, 1, half_life_s=10.0)
    window.add(report(1000, [1000]), 0.0)
    assert not window.has_seen(64)
    window.add(report(1000, [1000], layer=1), 0.0)
    assert window.has_seen(64)
    window.add(report(0, [0]), 100.0)
    assert not window.has_seen(64)


def test_a_report_of_another_model_is_not_taken() -> None:
    window = LoadWindow(1, 2, half_life_s=10.0)
    window.add(report(10, [1, 2, 3]), 0.0)
    window.add(report(10, [1, 2], layer=5), 0.0)

    assert not window.rows_LE.any()


def test_shares_are_of_the_time_that_passed() -> None:
    worker, gateway = ShareWindow(half_life_s=1e-6), ShareWindow(half_life_s=1e-6)
    worker.note(WorkerStats(compute_s=5.0), 10.0)
    gateway.note(GatewayStats(step_s=5.0, dispatch_wait_s=4.0), 10.0)
    worker.note(WorkerStats(compute_s=6.0, queue_age_s=0.2), 14.0)
    gateway.note(GatewayStats(step_s=7.0, dispatch_wait_s=4.5), 14.0)

    assert worker.latest.busy == pytest.approx(0.25)
    assert worker.latest.queue_age_s == 0.2
    assert gateway.latest.waiting == pytest.approx(0.25)


def test_ranks_that_tell_nothing_do_not_change_what_the_first_one_told() -> None:
    window = ShareWindow(half_life_s=1.0)
    window.note(GatewayStats(), 0.0)
    window.note(None, 0.999)
    window.note(GatewayStats(steps=10, step_s=1.0, dispatch_wait_s=0.8), 1.0)

    assert window.latest.waiting == pytest.approx(0.4)


def test_the_longest_wait_is_remembered_for_a_while() -> None:
    window = ShareWindow(half_life_s=1.0)
    window.note(WorkerStats(), 0.0)
    window.note(WorkerStats(queue_age_s=0.4), 1.0)
    window.note(WorkerStats(), 2.0)

    assert window.latest.queue_age_s == pytest.approx(0.2)


MODEL = Placement("v", 2, 8)
CREW = {MemberId(f"w{i}", 1): Seat(9) for i in range(3)}
EVERY = [ExpertId(layer, e) for layer in range(2) for e in range(8)]
HELD = {w: {e: s for s, e in enumerate(EVERY[i::3])} for i, w in enumerate(CREW)}


def rebalancer(now_s: float = 0.0, **options) -> Rebalancer:
    made = Rebalancer(MODEL, RebalanceOptions(period_s=10.0, **options), now_s)
    consider(made, CREW, now_s)
    return made


def consider(made: Rebalancer, crew, now_s: float, *, calm: bool = True):
    """As the controller does."""
    if not made.is_due(crew, calm=calm, now_s=now_s):
        return None
    return made.consider(crew, HELD, floor=1, now_s=now_s)


def hear(made: Rebalancer, now_s: float) -> None:
    for layer in range(2):
        made.hear(report(1000, [900, 0, 0, 900, 0, 0, 900, 0], layer), now_s)


def test_nothing_moves_before_there_is_load_nor_before_the_period_is_over() -> None:
    made = rebalancer()
    assert consider(made, CREW, 11.0) is None
    hear(made, 12.0)

    assert consider(made, CREW, 13.0) is None
    assert consider(made, CREW, 30.0, calm=False) is None
    taken = consider(made, CREW, 30.0)
    assert taken is not None
    assert taken.num_moves
    assert taken.gain > 0.1  # the three hot experts of layer 0 lie on one worker


def test_a_gain_that_is_too_small_changes_nothing() -> None:
    made = rebalancer(min_gain=0.99)
    hear(made, 12.0)

    assert consider(made, CREW, 30.0) is None


def test_a_newcomer_is_planned_for_at_once_even_when_nothing_is_calm() -> None:
    made = rebalancer()
    hear(made, 1.0)
    more = {**CREW, MemberId("w9", 1): Seat(9)}

    taken = consider(made, more, 2.0, calm=False)
    assert taken is not None
    assert made.wanted is not None
    assert made.wanted[MemberId("w9", 1)]


def test_without_load_a_newcomer_takes_an_even_share_and_a_new_controller_moves_nothing() -> None:
    made = rebalancer()
    assert made.wanted == {w: tuple(HELD[w]) for w in CREW}

    consider(made, {**CREW, MemberId("w9", 1): Seat(9)}, 1.0)
    assert made.wanted is None


def test_a_trace_comes_back_as_it_was_saved(tmp_path) -> None:
    chosen = np.array([[[0, 1]], [[1, 2]], [[0, 1]]], dtype=np.uint16)
    trace = RoutingTrace("m", 4, np.array([2, 1], dtype=np.uint32), chosen)
    trace.save(tmp_path / "t.npz")

    again = RoutingTrace.load(tmp_path / "t.npz")

    assert [step.shape for step in again.steps()] == [(2, 1, 2), (1, 1, 2)]
    assert again.shares_LE()[0] == pytest.approx([2 / 3, 1.0, 1 / 3, 0.0])
    assert again.batches_LNE(1, 50, seed=0).sum(axis=2).tolist() == [[2] * 50]
    assert activation_of(again.shares_LE(), 2)[0] == pytest.approx([8 / 9, 1.0, 5 / 9, 0.0])


def test_what_is_no_trace_is_refused(tmp_path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(TraceError, match="is no recorded trace"):
        RoutingTrace.load(path)
    chosen = np.array([[[9]]], dtype=np.uint16)
    RoutingTrace("m", 4, np.array([1], dtype=np.uint32), chosen).save(path)
    with pytest.raises(TraceError, match="beyond its 4"):
        RoutingTrace.load(path)


def test_a_gateway_without_steps_is_less_and_less_loaded() -> None:
    window = ShareWindow(half_life_s=5.0)
    window.note(GatewayStats(), 0.0)
    window.note(GatewayStats(steps=10, step_s=20.0, dispatch_wait_s=10.0), 100.0)
    busy = window.latest
    assert busy.step_s == pytest.approx(2.0, rel=1e-3)

    window.note(GatewayStats(steps=10, step_s=20.0, dispatch_wait_s=10.0), 105.0)
    assert window.latest.step_s == pytest.approx(busy.step_s / 2)
    assert window.latest.waiting == pytest.approx(busy.waiting / 2)


def test_a_step_that_lasts_over_several_pulses_counts_whole() -> None:
    window = ShareWindow(half_life_s=5.0)
    window.note(GatewayStats(running=1), 0.0)
    for number in range(1, 60):
        steps = number // 4
        window.note(
            GatewayStats(running=1, steps=steps, step_s=2.0 * steps, dispatch_wait_s=number / 2.0),
            0.5 * number,
        )
    assert window.latest.step_s == pytest.approx(2.0, rel=0.05)
    assert window.latest.waiting == pytest.approx(1.0, rel=0.05)
