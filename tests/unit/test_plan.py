"""Which rows go where: every pair once, single copies first, the busiest worker spared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.dispatch.plan import Planner, ReplicaIndex, Standing
from workers.placement import (
    ExpertId,
    Member,
    MemberId,
    MemberState,
    Placement,
    Replica,
    Role,
    View,
)

LAYER = 1


def make_view(holders: dict[int, list[int]], num_workers: int, num_experts: int, draining=()):
    """A View in which expert e of layer 1 is on the workers holders[e]."""
    ids = [MemberId(f"worker-{i}", 1) for i in range(num_workers)]
    members = tuple(
        Member(
            id=ids[i],
            role=Role.EXPERT_WORKER,
            state=MemberState.DRAINING if i in draining else MemberState.ACTIVE,
        )
        for i in range(num_workers)
    )
    replicas = {
        ExpertId(LAYER, e): tuple(Replica(ids[w], 0) for w in workers)
        for e, workers in holders.items()
    }
    return View(1, 1, members, Placement("test", 2, num_experts, replicas))


def make_planner(holders, num_workers, num_experts, standing=None, rows_per_call=64, without=()):
    index = ReplicaIndex(make_view(holders, num_workers, num_experts))
    return Planner(
        index,
        standing or [Standing.GOOD] * num_workers,
        rows_per_call=rows_per_call,
        without=frozenset(without),
    )


def pairs_of(call):
    """The (row, k, expert) triples of a call, and the check that its mask says the same."""
    rows = range(len(call.masks_R)) if call.rows_R is None else call.rows_R.tolist()
    found = set()
    for row, ids, mask in zip(rows, call.ids_RK.tolist(), call.masks_R.tolist(), strict=True):
        named = {(row, k, e) for k, e in enumerate(ids) if e >= 0}
        assert {k for _, k, _ in named} == {k for k in range(32) if mask >> k & 1}
        assert named, "a row that does not touch the worker was sent"
        found |= named
    return found


@st.composite
def cases(draw):
    num_workers = draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    num_rows = draw(st.integers(0, 12))
    holders = {
        e: sorted(draw(st.sets(st.integers(0, num_workers - 1)))) for e in range(num_experts)
    }
    standing = draw(
        st.lists(st.sampled_from(list(Standing)), min_size=num_workers, max_size=num_workers)
    )
    ids = [draw(st.permutations(range(num_experts)))[:top_k] for _ in range(num_rows)]
    array = np.array(ids, dtype=np.int64).reshape(num_rows, top_k)
    blank = draw(st.lists(st.booleans(), min_size=array.size, max_size=array.size))
    array[np.array(blank, dtype=bool).reshape(array.shape)] = -1
    return num_workers, num_experts, holders, standing, array, draw(st.integers(1, 5))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(cases())
def test_every_pair_goes_once_to_a_usable_holder_or_is_unserved(case):
    num_workers, num_experts, holders, standing, ids, rows_per_call = case
    planner = make_planner(holders, num_workers, num_experts, standing, rows_per_call)
    plan = planner.plan(LAYER, ids)

    served = set()
    for call in plan.calls:
        assert len(call.masks_R) <= rows_per_call
        assert standing[call.worker] is not Standing.UNUSABLE
        pairs = pairs_of(call)
        assert not served & pairs
        served |= pairs
        for _, _, expert in pairs:
            assert call.worker in holders[expert]
            if standing[call.worker] is Standing.LAST_RESORT:
                assert all(standing[w] is not Standing.GOOD for w in holders[expert])
    unserved = pairs_of(plan.unserved) if plan.unserved else set()
    assert not served & unserved
    assert served | unserved == {
        (r, k, e) for r, row in enumerate(ids.tolist()) for k, e in enumerate(row) if e >= 0
    }
    for _, _, expert in unserved:
        assert all(standing[w] is Standing.UNUSABLE for w in holders[expert])


def test_calls_come_in_order_of_worker():
    planner = make_planner({0: [2], 1: [0], 2: [1]}, 3, 3)
    plan = planner.plan(LAYER, np.array([[0, 1, 2]]))
    assert [call.worker for call in plan.calls] == [0, 1, 2]


def test_single_copies_are_counted_before_a_choice_is_made():
    # Worker 0 must compute experts 0 to 2, so expert 3, on both, belongs on worker 1.
    planner = make_planner({0: [0], 1: [0], 2: [0], 3: [0, 1]}, 2, 4)
    plan = planner.plan(LAYER, np.array([[3, 2], [0, 1]]))
    assert {call.worker: call.num_experts for call in plan.calls} == {0: 3, 1: 1}


def test_choices_spread_distinct_experts_evenly():
    holders = {e: [0, 1, 2, 3] for e in range(16)}
    plan = make_planner(holders, 4, 16).plan(LAYER, np.arange(16).reshape(4, 4))
    assert [call.num_experts for call in plan.calls] == [4, 4, 4, 4]


def test_all_rows_of_an_expert_go_to_one_worker():
    plan = make_planner({0: [0, 1]}, 2, 1).plan(LAYER, np.zeros((9, 1), dtype=np.int64))
    assert len(plan.calls) == 1
    assert plan.calls[0].rows_R is None


def test_what_a_worker_is_doing_already_counts():
    planner = make_planner({0: [0, 1]}, 2, 1)
    plan = planner.plan(LAYER, np.array([[0]]), lambda: [3, 1])
    assert plan.calls[0].worker == 1


def test_an_expert_that_a_worker_denied_is_not_asked_of_it():
    planner = make_planner({0: [0, 1], 1: [0]}, 2, 2, without={(LAYER, 0, 0)})
    plan = planner.plan(LAYER, np.array([[0, 1]]))
    assert [(c.worker, c.ids_RK.tolist()) for c in plan.calls] == [(0, [[-1, 1]]), (1, [[0, -1]])]
    assert (
        not make_planner({0: [0]}, 1, 1, without={(LAYER, 0, 0)}).plan(LAYER, np.array([[0]])).calls
    )


def test_rows_beyond_what_a_message_holds_take_several_in_order():
    plan = make_planner({0: [0]}, 1, 1, rows_per_call=4).plan(LAYER, np.zeros((10, 1), dtype=int))
    assert [call.rows_R.tolist() for call in plan.calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("usable", [True, False])
def test_whether_others_could_serve_counts_only_good_workers(usable):
    standing = [Standing.LAST_RESORT, Standing.GOOD if usable else Standing.UNUSABLE]
    planner = make_planner({0: [0, 1], 1: [0]}, 2, 2, standing)
    assert planner.serves(LAYER, np.array([[0, -1]])) is usable
    assert not planner.serves(LAYER, np.array([[0, 1]]))


def test_without_workers_everything_is_unserved():
    plan = make_planner({}, 0, 3).plan(LAYER, np.array([[0, 2]]))
    assert not plan.calls
    assert plan.unserved is not None
    assert pairs_of(plan.unserved) == {(0, 0, 0), (0, 1, 2)}


def test_a_draining_worker_is_in_the_index_and_marked():
    index = ReplicaIndex(make_view({0: [0, 1]}, 2, 1, draining=(1,)))
    assert index.draining_W.tolist() == [False, True]
