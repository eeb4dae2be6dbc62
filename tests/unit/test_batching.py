"""What waits is computed together: by layer, then by expert over all calls."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import DispatchError
from workers.expert.batching import (
    OTHERS_SETTLE_S,
    PASSES,
    SETTLE_S,
    CallQueue,
    group_by_expert,
    into_batches,
    masks_of,
)


@dataclass
class Waiting:
    name: str
    batch_key: tuple[int, int] = (0, 0)
    is_alone: bool = False
    is_settled: bool = False
    arrived_s: float = 0.0


def test_calls_of_one_layer_are_one_batch_whoever_sent_them_and_the_oldest_comes_first():
    calls = [Waiting("a", (3, 0)), Waiting("b", (1, 0)), Waiting("c", (3, 0)), Waiting("d", (3, 1))]
    batches = [[call.name for call in batch] for batch in into_batches(calls)]
    assert batches == [["a", "c"], ["b"], ["d"]]


def test_who_must_be_alone_is_taken_one_by_one_when_nothing_else_waits():
    queue = CallQueue()
    calls = {name: Waiting(name, is_alone=name in "xyz") for name in "xaybz"}
    for call in calls.values():
        queue.put(call)

    def take(now_s):
        return "".join(call.name for call in queue.take(now_s))

    assert queue.oldest() is calls["x"]
    assert (take(0.0), take(0.0)) == ("ab", "x")
    assert not queue.has_next(0.5), "the reply to x may still be on its way"
    assert take(0.5) == ""
    queue.put(Waiting("c"))
    assert queue.has_next(0.5)
    assert take(0.5) == "c"
    calls["x"].is_settled = True
    assert queue.has_next(0.5)
    assert take(0.5) == "y"
    assert take(0.5 + SETTLE_S / 2) == ""
    assert take(0.5 + SETTLE_S) == "z", "nobody waits for a gateway for long"
    assert not queue
    assert queue.oldest() is None


def test_who_must_be_alone_is_passed_over_a_few_times_and_no_more():
    queue = CallQueue()
    queue.put(Waiting("x", is_alone=True))
    taken = []
    for turn in range(PASSES + 2):
        queue.put(Waiting(str(turn)))
        taken.append("".join(call.name for call in queue.take(float(turn))))
    assert taken[PASSES] == "x"
    assert "".join(taken) == "0123x45"


def test_nothing_is_computed_while_the_reply_to_who_was_alone_may_be_lost():
    """Its worker might end by what comes next, and would seem to have ended by the one before."""
    queue = CallQueue()
    alone, others = Waiting("x", is_alone=True), Waiting("a")
    queue.put(alone)
    assert queue.take(0.0) == [alone]
    queue.put(others)
    assert not queue.has_next(OTHERS_SETTLE_S / 2)
    assert queue.take(OTHERS_SETTLE_S / 2) == []
    assert queue.has_next(OTHERS_SETTLE_S), "for many others its gateway is waited for less long"
    alone.is_settled = True
    assert queue.has_next(OTHERS_SETTLE_S / 2)
    assert queue.take(OTHERS_SETTLE_S / 2) == [others]


def test_who_must_be_alone_is_not_computed_for_a_gateway_that_is_gone():
    queue = CallQueue()
    for name in "xy":
        queue.put(Waiting(name, is_alone=True, is_settled=name == "x"))
    assert [call.name for call in queue.take(0.0)] == ["y"]
    assert not queue


def test_the_oldest_is_who_came_first_of_either_kind():
    queue = CallQueue()
    assert queue.oldest() is None
    for call in (Waiting("x", is_alone=True, arrived_s=2.0), Waiting("a", arrived_s=1.0)):
        queue.put(call)
    assert queue.oldest().name == "a"
    queue.take(3.0)
    assert queue.oldest().name == "x"


def test_nothing_waiting_is_no_batch():
    assert into_batches([]) == []


@st.composite
def cases(draw):
    num_experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, 5))
    num_rows = draw(st.integers(0, 9))
    ids = draw(
        st.lists(
            st.integers(-1, num_experts - 1), min_size=num_rows * top_k, max_size=num_rows * top_k
        )
    )
    here = draw(st.lists(st.booleans(), min_size=num_experts, max_size=num_experts))
    slots = np.array([10 + 3 * e if h else -1 for e, h in enumerate(here)], dtype=np.int64)
    return np.array(ids, dtype=np.int32).reshape(num_rows, top_k), slots


@settings(derandomize=True, deadline=None, max_examples=300)
@given(cases())
def test_every_pair_that_is_here_is_in_the_group_of_its_expert(case):
    ids, slots = case
    groups = group_by_expert(ids, np.append(slots, -1))
    assert len(groups.offsets) == len(groups.slots) + 1
    seen = []
    for g, slot in enumerate(groups.slots):
        pairs = groups.pairs_P[groups.offsets[g] : groups.offsets[g + 1]]
        assert len(pairs)
        assert {slots[e] for e in ids.reshape(-1)[pairs]} == {slot}
        assert sorted(pairs) == list(pairs), "in the order of rows"
        seen += pairs.tolist()
    assert len(set(groups.slots)) == len(groups.slots)
    wanted = [p for p, e in enumerate(ids.reshape(-1).tolist()) if e >= 0 and slots[e] >= 0]
    assert sorted(seen) == wanted
    assert groups.rows_P.tolist() == [p // ids.shape[1] for p in groups.pairs_P]
    top_k = ids.shape[1]
    masks = masks_of(groups, *ids.shape).tolist()
    found = [(r, k) for r, mask in enumerate(masks) for k in range(top_k) if mask >> k & 1]
    assert found == [divmod(p, top_k) for p in wanted]


def test_an_expert_that_the_model_does_not_have_is_refused():
    with pytest.raises(DispatchError, match="expert 4 of 3"):
        group_by_expert(np.array([[0, 4]], dtype=np.int32), np.array([0, 1, 2, -1]))
