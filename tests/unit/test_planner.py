"""Placement: coverage, floor, distinct workers, no needless move."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.planner import Seat, place, plan_loads, slots_needed
from workers.errors import PlacementError
from workers.placement import ExpertId, MemberId, Placement


def workers(*slots: int):
    return {MemberId(f"w{i}", 1): s for i, s in enumerate(slots)}


def empty(layers: int, experts: int) -> Placement:
    return Placement("v", layers, experts)


@settings(derandomize=True, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 7), st.integers(1, 3))
def test_every_expert_has_its_floor_on_distinct_workers(layers, experts, count, floor) -> None:
    slots = slots_needed(layers, experts, count, floor)
    crew = workers(*[slots] * count)

    placement = place(empty(layers, experts), crew, floor=floor)

    taken = set()
    for layer in range(layers):
        for expert in range(experts):
            replicas = placement.of(layer, expert)
            assert len(replicas) == len({r.worker for r in replicas}) == min(floor, count)
            for replica in replicas:
                assert 0 <= replica.slot < crew[replica.worker]
                assert replica not in taken
                taken.add(replica)


def test_each_layer_is_spread_evenly() -> None:
    placement = place(empty(4, 32), workers(60, 60, 60), floor=1)

    for layer in range(4):
        holders = [placement.of(layer, e)[0].worker for e in range(32)]
        counts = [holders.count(w) for w in set(holders)]
        assert max(counts) - min(counts) <= 1


def test_what_is_placed_stays_when_a_worker_is_lost() -> None:
    crew = workers(20, 20, 20)
    before = place(empty(2, 12), crew, floor=1)
    gone = MemberId("w1", 1)
    crew.pop(gone)
    crew[MemberId("w1", 2)] = 20

    after = place(before, crew, floor=1)

    for expert, replicas in before.replicas.items():
        if replicas[0].worker != gone:
            assert after.replicas[expert] == replicas
        else:
            assert after.replicas[expert][0].worker == MemberId("w1", 2)


def test_too_few_slots_are_refused_with_the_numbers() -> None:
    with pytest.raises(PlacementError, match="3 slots on 2 expert workers cannot hold the 4"):
        place(empty(1, 4), workers(2, 1), floor=1)


def test_first_copies_come_before_second_ones() -> None:
    placement = place(empty(1, 4), workers(3, 3), floor=2)

    assert all(placement.of(0, e) for e in range(4))
    assert sum(len(r) for r in placement.replicas.values()) == 6


def test_uncovered_names_the_experts_without_a_serving_replica() -> None:
    crew = workers(4, 4)
    placement = place(empty(1, 4), crew, floor=1)
    lost = placement.uncovered([MemberId("w0", 1)])

    assert lost == [ExpertId(0, 1), ExpertId(0, 3)]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.data())
def test_a_plan_never_takes_a_copy_that_is_needed_nor_a_slot_twice(data) -> None:
    layers, experts, floor = (data.draw(st.integers(1, n)) for n in (3, 8, 3))
    count = data.draw(st.integers(1, 5))
    slots = data.draw(st.integers(1, layers * experts + 2))
    crew = [MemberId(f"w{i}", 1) for i in range(count)]
    every = [ExpertId(layer, e) for layer in range(layers) for e in range(experts)]
    held = {}
    for worker in crew:
        chosen = data.draw(st.lists(st.sampled_from(every), unique=True, max_size=slots))
        held[worker] = {expert: slot for slot, expert in enumerate(chosen)}
    doubtful = data.draw(st.sets(st.sampled_from(crew), max_size=count - 1))
    seats = {w: Seat(slots, data.draw(st.sampled_from(["a", "b"]))) for w in crew}

    def sound(expert, holdings):
        return {w for w in crew if w not in doubtful and expert in holdings[w]}

    try:
        loads = plan_loads(empty(layers, experts), seats, held, floor=floor, doubtful=doubtful)
    except PlacementError:
        return
    after = {worker: dict(slots) for worker, slots in held.items()}
    places = [(load.worker, load.slot) for load in loads]
    assert len(places) == len(set(places))
    for load in loads:
        assert load.slot < slots
        mine = {e: s for e, s in after[load.worker].items() if s != load.slot}
        assert load.expert not in mine
        after[load.worker] = {**mine, load.expert: load.slot}
    for expert in every:
        before, now = sound(expert, held), {w for w in crew if expert in after[w]}
        assert now
        assert len(sound(expert, after)) >= min(len(before), 1)


def test_a_small_worker_takes_what_it_has_room_for_and_then_all_rest() -> None:
    model, held = empty(4, 32), {}
    seats = {MemberId(f"w{i}", 1): Seat(200) for i in range(2)}
    for round_ in range(8):
        if round_ == 1:
            seats[MemberId("w2", 1)] = Seat(20)
        loads = plan_loads(model, seats, held, floor=1)
        for load in loads:
            mine = held.setdefault(load.worker, {})
            held[load.worker] = {e: s for e, s in mine.items() if s != load.slot}
            held[load.worker][load.expert] = load.slot
    assert loads == []
    in_layer = [sum(e.layer == layer for e in held[MemberId("w2", 1)]) for layer in range(4)]
    assert in_layer == [5] * 4


def test_a_partial_plan_covers_as_many_experts_as_there_is_room_for() -> None:
    model = empty(2, 4)
    seats = {MemberId(f"w{i}", 1): Seat(3) for i in range(2)}
    with pytest.raises(PlacementError):
        plan_loads(model, seats, {}, floor=2)
    loads = plan_loads(model, seats, {}, floor=2, partial=True)
    assert len({load.expert for load in loads}) == len(loads) == 6
    assert all(load.urgent for load in loads)
