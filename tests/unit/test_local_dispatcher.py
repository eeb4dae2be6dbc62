"""The reference dispatcher."""

import pytest
import torch

from tests.unit.test_experts import EXPERTS, HIDDEN, define_expert, draw_experts, make_shard
from workers.dispatch.local import LocalDispatcher
from workers.errors import PlacementError
from workers.model.layers import ROW_TILE
from workers.placement import ExpertId


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SLOTS = {ExpertId(3, expert): EXPERTS - expert for expert in range(EXPERTS)}


@pytest.mark.parametrize("row_tile", [None, ROW_TILE])
@pytest.mark.parametrize("num_rows", [1, 2, 17])
@pytest.mark.parametrize("num_experts", [2, EXPERTS])
def test_rows_get_the_weighted_sum_of_their_experts(
    row_tile: int | None, num_rows: int, num_experts: int
) -> None:
    """With two experts of two chosen, every row goes to the same hot ones."""
    torch.manual_seed(0)
    dispatcher = LocalDispatcher(make_shard(row_tile), SLOTS)
    x, weights = torch.randn(num_rows, HIDDEN), torch.rand(num_rows, 2)
    ids = torch.stack([torch.randperm(num_experts)[:2] for _ in range(num_rows)])

    handle = dispatcher.dispatch(3, x, ids, weights)

    assert handle.num_rows == num_rows
    parameters = draw_experts()
    expected = [
        sum(w * define_expert(parameters[e], row) for e, w in zip(i, ws, strict=True))
        for row, i, ws in zip(x, ids.tolist(), weights, strict=True)
    ]
    torch.testing.assert_close(dispatcher.combine(handle), torch.stack(expected))


def test_handles_may_be_combined_in_any_order() -> None:
    dispatcher = LocalDispatcher(make_shard(), SLOTS)
    x, ids, weights = torch.randn(2, HIDDEN), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    first = dispatcher.dispatch(3, x, ids, weights)
    second = dispatcher.dispatch(3, 2 * x, ids, weights)

    assert dispatcher.combine(second).shape == dispatcher.combine(first).shape
    dispatcher.close()


def test_bit_stable_rows_do_not_depend_on_their_company_or_on_slots() -> None:
    x, weights = torch.randn(9, HIDDEN), torch.rand(9, 2)
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(9)])
    together = LocalDispatcher(make_shard(ROW_TILE), SLOTS)
    expected = together.combine(together.dispatch(3, x, ids, weights))
    shard = make_shard(ROW_TILE)
    shard.write(0, draw_experts()[2])
    elsewhere = LocalDispatcher(shard, SLOTS | {ExpertId(3, 2): 0})

    for row in range(9):
        at = slice(row, row + 1)
        handle = elsewhere.dispatch(3, x[at], ids[at], weights[at])
        assert torch.equal(expected[at], elsewhere.combine(handle))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_an_expert_in_no_slot_is_named(num_rows: int) -> None:
    dispatcher = LocalDispatcher(make_shard(), {ExpertId(3, 0): 1, ExpertId(3, 2): 2})

    with pytest.raises(PlacementError, match=r"layer 3: experts \[1\]"):
        dispatcher.dispatch(
            3,
            torch.randn(num_rows, HIDDEN),
            torch.tensor([[0, 1]] * num_rows),
            torch.ones(num_rows, 2),
        )
