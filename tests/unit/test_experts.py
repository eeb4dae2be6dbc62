"""Experts in slots, on adversarial gating, against their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from workers.dispatch.pairs import group_pairs, sum_pairs
from workers.model.experts import ExpertShard
from workers.model.layers import ROW_TILE
from workers.model.parameters import ExpertParameters


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


EXPERTS, HIDDEN, WIDTH = 5, 12, 6


def draw_experts() -> list[ExpertParameters]:
    draw = torch.Generator().manual_seed(0)
    return [
        ExpertParameters(
            gate_up=0.3 * torch.randn(2 * WIDTH, HIDDEN, generator=draw),
            down=0.3 * torch.randn(HIDDEN, WIDTH, generator=draw),
        )
        for _ in range(EXPERTS)
    ]


def define_expert(expert: ExpertParameters, x: Tensor) -> Tensor:
    gate, up = (expert.gate_up @ x).chunk(2)
    return expert.down @ (functional.silu(gate) * up)


def make_shard(row_tile: int | None = None) -> ExpertShard:
    """Expert e sits in slot EXPERTS - e; slot 0 stays empty."""
    shard = ExpertShard(EXPERTS + 1, HIDDEN, WIDTH, row_tile=row_tile)
    for expert, parameters in enumerate(draw_experts()):
        shard.write(EXPERTS - expert, parameters)
    return shard


@pytest.mark.parametrize("row_tile", [None, ROW_TILE])
@given(
    chosen=st.lists(
        st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2, unique=True), max_size=40
    )
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_every_pair_is_its_expert_of_its_row(row_tile: int | None, chosen: list[list[int]]) -> None:
    x = torch.randn(len(chosen), HIDDEN)
    order, experts, offsets = group_pairs(torch.tensor(chosen).view(-1, 2).long(), EXPERTS)
    rows = order // 2

    y = make_shard(row_tile).forward(x, rows, [EXPERTS - e for e in experts], offsets)

    assert y.shape == (2 * len(chosen), HIDDEN)
    parameters = draw_experts()
    for pair, index in enumerate(order.tolist()):
        expert = chosen[index // 2][index % 2]
        torch.testing.assert_close(y[pair], define_expert(parameters[expert], x[index // 2]))


def test_a_single_row_is_the_weighted_sum_of_its_experts() -> None:
    x, weights, chosen = torch.randn(1, HIDDEN), torch.tensor([[0.7, 0.2, 0.1]]), [4, 0, 2]
    parameters = draw_experts()

    y = make_shard().forward_row(x, weights, [EXPERTS - e for e in chosen])

    expected = sum(
        w * define_expert(parameters[e], x[0]) for w, e in zip(weights[0], chosen, strict=True)
    )
    torch.testing.assert_close(y[0], expected)


def test_a_tiled_row_does_not_depend_on_its_company() -> None:
    x = torch.randn(40, HIDDEN)
    shard = make_shard(ROW_TILE)
    together = shard.forward(x, torch.arange(40), [3], [0, 40])

    for row in range(40):
        alone = shard.forward(x, torch.tensor([row]), [3], [0, 1])
        assert torch.equal(together[row], alone[0])


def test_grouped_products_equal_the_loop() -> None:
    """Slots 2 and 4 lie between the groups and get no pair; rows fill 16 bytes evenly."""
    shard, x = ExpertShard(6, 16, 8), torch.randn(9, 16)
    slots, sizes = [1, 3, 5], [4, 0, 5]
    for slot in slots:
        weights = ExpertParameters(gate_up=torch.randn(16, 16), down=torch.randn(16, 8))
        shard.write(slot, weights)

    grouped = shard.forward_grouped(x, slots, sizes)

    looped = shard.forward(x, torch.arange(9), slots, [0, 4, 4, 9])
    torch.testing.assert_close(grouped, looped)


def test_a_slot_can_be_written_again() -> None:
    shard, x = make_shard(), torch.randn(1, HIDDEN)
    other = draw_experts()[1]

    shard.write(0, other)

    y = shard.forward(x, torch.tensor([0]), [0], [0, 1])
    torch.testing.assert_close(y[0], define_expert(other, x[0]))


def test_pairs_are_summed_one_by_one_in_their_order() -> None:
    """Other dispatchers must reach the same bits, so the order is part of the contract."""
    torch.manual_seed(0)
    y, weights, rows = torch.randn(300, 16), torch.rand(300), torch.randint(0, 7, (300,))
    expected = torch.zeros(8, 16)
    for pair in range(300):
        expected[rows[pair]] = expected[rows[pair]] + y[pair] * weights[pair]

    assert torch.equal(expected, sum_pairs(y, weights, rows, 8))


def test_groups_are_sorted_by_expert_then_by_row() -> None:
    order, experts, offsets = group_pairs(torch.tensor([[3, 0], [0, 1], [3, 1]]), 6)

    assert order.tolist() == [1, 2, 3, 5, 0, 4]
    assert experts == [0, 1, 3]
    assert offsets == [0, 2, 4, 6]
