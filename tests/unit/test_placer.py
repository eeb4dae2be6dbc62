"""Placement by load: room and floor kept, moves bounded, never a layer worse than before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.placing.forecast import activated_LNW, busiest_L, draw_batches
from cluster.control.placing.placer import plan_target
from cluster.control.placing.survival import survival_of
from cluster.control.planner import Seat, plan_loads
from tests.bench.eplb import by_token_count, round_robin
from tests.unit.test_plan import make_planner
from workers.errors import PlacementError
from workers.placement import ExpertId, MemberId, Placement


def crew_of(*slots: int, nodes: str = "") -> dict[MemberId, Seat]:
    return {MemberId(f"w{i:03d}", 1): Seat(s, nodes[i : i + 1]) for i, s in enumerate(slots)}


def zipf_LE(layers: int, experts: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, experts + 1)
    return draw.permuted(np.tile(weights / weights.max(), (layers, 1)), axis=1)


@st.composite
def cases(draw):
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    floor, count = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    least = -(-layers * experts // count)
    slots = [draw(st.integers(least, 2 * layers * experts + 1)) for _ in range(count)]
    seats = crew_of(*slots, nodes=draw(st.text("ab", min_size=count, max_size=count)))
    shares = st.lists(st.floats(0, 1), min_size=experts, max_size=experts)
    activation_LE = np.array([draw(shares) for _ in range(layers)])
    every = [ExpertId(layer, e) for layer in range(layers) for e in range(experts)]
    held = {}
    if draw(st.booleans()):
        for worker, seat in seats.items():
            mine = draw(st.lists(st.sampled_from(every), unique=True, max_size=seat.num_slots))
            held[worker] = {expert: slot for slot, expert in enumerate(mine)}
    return Placement("v", layers, experts), seats, held, activation_LE, floor


@settings(derandomize=True, max_examples=150, deadline=None)
@given(cases(), st.one_of(st.none(), st.integers(0, 20)))
def test_a_target_keeps_room_and_floor_and_bounds_its_moves(case, max_moves) -> None:
    model, seats, held, activation_LE, floor = case
    target = plan_target(model, seats, held, activation_LE, floor=floor, max_moves=max_moves)
    held_LEW = np.zeros_like(target.holds_LEW)
    for number, worker in enumerate(target.workers):
        for expert in held.get(worker, {}):
            held_LEW[expert.layer, expert.expert, number] = True

    moved_LEW = target.holds_LEW & ~held_LEW
    assert moved_LEW.sum() == target.num_moves
    if max_moves is not None:
        assert target.num_moves <= max_moves
    for number, worker in enumerate(target.workers):
        assert (
            target.holds_LEW[:, :, number].sum() <= seats[worker].num_slots or not moved_LEW.any()
        )
    changed = (target.holds_LEW != held_LEW).any(axis=(1, 2))
    before_LE, after_LE = held_LEW.sum(axis=2), target.holds_LEW.sum(axis=2)
    assert (np.minimum(after_LE, floor) >= np.minimum(before_LE, floor))[~changed].all()
    lacked = np.minimum(before_LE, floor).sum(axis=1)
    # Where slots are too few for the floor, a layer may give copies up for others that lack more.
    kept = np.minimum(after_LE, floor).sum(axis=1) >= lacked
    assert kept.all() or np.minimum(after_LE, floor).sum() > lacked.sum()
    same = (np.minimum(after_LE, floor).sum(axis=1) == lacked) & kept.all()
    assert (target.busiest_L[same] <= target.busiest_before_L[same]).all()


@settings(derandomize=True, max_examples=100, deadline=None)
@given(cases())
def test_a_first_placement_covers_everything_and_meets_the_floor_where_slots_allow(case) -> None:
    model, seats, _, activation_LE, floor = case
    target = plan_target(model, seats, {}, activation_LE, floor=floor)

    copies_LE = target.holds_LEW.sum(axis=2)
    assert (copies_LE >= 1).all()
    wanted = min(floor, len(seats))
    each = min((s.num_slots - 1) // model.num_layers for s in seats.values())
    if each * len(seats) >= wanted * model.num_experts and each <= model.num_experts:
        assert (copies_LE >= wanted).all()


def test_two_copies_lie_on_two_nodes_where_there_are_two() -> None:
    seats = crew_of(*[20] * 6, nodes="aaabbb")
    model = Placement("v", 2, 12)

    target = plan_target(model, seats, {}, zipf_LE(2, 12), floor=2)

    node_W = np.array([seats[w].node for w in target.workers])
    for node in "ab":
        assert (target.holds_LEW[:, :, node_W == node].sum(axis=2) >= 1).all()


def test_workers_with_more_slots_get_more() -> None:
    seats = crew_of(9, 9, 17, 33)
    target = plan_target(Placement("v", 2, 16), seats, {}, zipf_LE(2, 16), floor=1)

    held = target.holds_LEW.sum(axis=(0, 1))
    assert held[0] <= 8
    assert held[1] <= 8
    assert held[3] > held[2] > held[0]


def test_too_few_slots_are_refused_with_the_numbers() -> None:
    with pytest.raises(PlacementError, match="3 slots on 2 expert workers cannot hold the 4"):
        plan_target(Placement("v", 1, 4), crew_of(2, 1), {}, zipf_LE(1, 4), floor=1)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data())
def test_the_forecast_chooses_replicas_as_gateways_do(data) -> None:
    workers, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    holders = {
        e: sorted(data.draw(st.sets(st.integers(0, workers - 1), min_size=1)))
        for e in range(experts)
    }
    active = sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1)))
    plan = make_planner(holders, workers, experts).plan(1, np.array([active]))
    done = np.zeros(workers)
    for call in plan.calls:
        done[call.worker] = len(set(call.ids_RK[call.ids_RK >= 0].tolist()))

    holds_LEW = np.zeros((1, experts, workers), dtype=bool)
    for expert, mine in holders.items():
        holds_LEW[0, expert, mine] = True
    batch_LNE = np.zeros((1, 1, experts), dtype=bool)
    batch_LNE[0, 0, active] = True
    assert activated_LNW(holds_LEW, batch_LNE)[0, 0].tolist() == done.tolist()


def test_placing_by_load_beats_packing_by_tokens_and_round_robin() -> None:
    layers, experts, workers, room = 4, 64, 16, 5
    shares_LE = zipf_LE(layers, experts) / 4
    activation_LE = 1 - (1 - shares_LE) ** 16
    model, seats = Placement("v", layers, experts), crew_of(*[room * layers + 1] * workers)
    target = plan_target(model, seats, {}, activation_LE, floor=1)

    batches_LNE = draw_batches(activation_LE, 200, seed=9)
    ours = busiest_L(target.holds_LEW, batches_LNE).mean()
    for other in (by_token_count, round_robin):
        assert ours <= busiest_L(other(shares_LE, workers, room), batches_LNE).mean()


def test_loads_move_towards_a_target_and_nothing_is_ever_uncovered() -> None:
    """Follows a rebalancing slot by slot: what is overwritten is loaded elsewhere at that time."""
    layers, experts, floor = 3, 12, 1
    model, seats = Placement("v", layers, experts), crew_of(13, 13, 13)
    every = [ExpertId(layer, e) for layer in range(layers) for e in range(experts)]
    workers = list(seats)
    held = {w: {e: s for s, e in enumerate(every[i::3])} for i, w in enumerate(workers)}
    target = plan_target(model, seats, held, zipf_LE(layers, experts), floor=floor)
    wanted = {w: target.held_by(w) for w in target.workers}
    assert target.num_moves

    for _ in range(100):
        loads = plan_loads(model, seats, held, floor=floor, wanted=wanted)
        if not loads:
            break
        for load in loads:  # all begin at once: what they overwrite is gone before any is loaded
            held[load.worker] = {e: s for e, s in held[load.worker].items() if s != load.slot}
        assert {e for mine in held.values() for e in mine} == set(every)
        for load in loads:
            held[load.worker][load.expert] = load.slot
    assert all(set(wanted[w]) <= held[w].keys() for w in workers)


def test_survival_counts_what_one_and_two_deaths_park() -> None:
    holds_LEW = np.zeros((1, 3, 4), dtype=bool)
    holds_LEW[0, 0, [0, 1]] = holds_LEW[0, 1, [0, 1, 2]] = holds_LEW[0, 2, 3] = True

    survival = survival_of(holds_LEW)

    assert survival.parked_by_one == (ExpertId(0, 2),)
    assert survival.pairs_survived == pytest.approx(2 / 6)  # (0, 1) lose expert 0, 3 loses 2
    assert survival.parked_by_pair == 1
