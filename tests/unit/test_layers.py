"""Norms, linear maps, embeddings and rotary positions against their definitions."""

import math

import pytest
import torch

from workers.model.config import RopeConfig, YarnConfig
from workers.model.layers import ROW_TILE, Linear, RmsNorm, VocabularyEmbedding, tiled_mm
from workers.model.rope import RotaryEmbedding, pair_rows, rotate_


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_zero_centred_norm_multiplies_by_one_plus_weight() -> None:
    x, weight = torch.randn(5, 12), torch.randn(12)

    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)

    torch.testing.assert_close(RmsNorm(weight, 1e-6)(x), expected)


def test_plain_norm_multiplies_by_weight_and_keeps_eps() -> None:
    x, weight = 1e-4 * torch.randn(5, 3, 12), torch.randn(3, 12)

    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    torch.testing.assert_close(RmsNorm(weight, 1e-6, offset=0.0)(x), expected)


def test_a_norm_of_a_zero_row_is_zero() -> None:
    assert torch.equal(RmsNorm(torch.ones(4), 1e-6)(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_joined_linear_maps_stand_side_by_side() -> None:
    x, first, second = torch.randn(3, 8), torch.randn(4, 8), torch.randn(2, 8)

    expected = torch.cat([x @ first.t(), x @ second.t()], 1)

    torch.testing.assert_close(Linear(first, second)(x), expected)


@pytest.mark.parametrize("num_rows", [0, 1, ROW_TILE, ROW_TILE + 1])
def test_tiles_compute_the_whole_product(num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 8), torch.randn(8, 5)

    torch.testing.assert_close(tiled_mm(x, weight, ROW_TILE), x @ weight)


@pytest.mark.parametrize(("inner", "outer"), [(24, 1), (64, 100), (300, 37), (1024, 128)])
def test_a_row_of_a_tile_does_not_depend_on_its_place_or_company(inner: int, outer: int) -> None:
    """What bit-stable mode rests on: torch computes the rows of one shape alike."""
    x, weight = torch.randn(ROW_TILE, inner), torch.randn(inner, outer)
    order = torch.randperm(ROW_TILE)
    together = torch.mm(x, weight)

    assert torch.equal(together[order], torch.mm(x[order], weight))
    for row in range(ROW_TILE):
        alone = tiled_mm(x[row : row + 1], weight, ROW_TILE)
        assert torch.equal(together[row : row + 1], alone)


def test_the_shares_of_a_vocabulary_parallel_embedding_add_up() -> None:
    weight = torch.randn(10, 4)
    token_ids = torch.tensor([0, 9, 4, 5])
    shares = [VocabularyEmbedding(weight[s : s + 5], s, whole=False) for s in (0, 5)]

    assert torch.equal(weight[token_ids], sum(share(token_ids) for share in shares))


class _Config:
    """The two fields of a configuration that positions need."""

    def __init__(self, rotary_dim: int, rope: RopeConfig) -> None:
        self.rotary_dim = rotary_dim
        self.rope = rope


def rotated(x: torch.Tensor, positions: torch.Tensor, config: _Config) -> torch.Tensor:
    """Rotate heads that are laid out as published: pairs half the rotary dimensions apart."""
    paired = pair_rows(x.flatten(0, 1).t(), 1, config.rotary_dim).t().reshape(x.shape).contiguous()
    rotate_(paired, RotaryEmbedding(config, torch.device("cpu")).rotations(positions))
    return paired


def test_only_the_leading_dimensions_of_a_head_rotate() -> None:
    config = _Config(8, RopeConfig(theta=100.0, partial_rotary_factor=0.5))
    x, positions = torch.randn(3, 2, 16), torch.tensor([0, 5, 1000])
    angles = positions[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :4], x[..., 4:8]

    y = rotated(x, positions, config)

    torch.testing.assert_close(y[..., 0:8:2], first * cos - second * sin)
    torch.testing.assert_close(y[..., 1:8:2], second * cos + first * sin)
    assert torch.equal(y[..., 8:], x[..., 8:])


def test_yarn_slows_only_slow_frequencies_and_scales_all() -> None:
    yarn = YarnConfig(
        factor=4.0,
        original_max_position_embeddings=256,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=0.1 * math.log(4) + 1,
        truncate=True,
    )
    config = _Config(32, RopeConfig(theta=1e4, partial_rotary_factor=1.0, yarn=yarn))
    plain = _Config(32, RopeConfig(theta=1e4, partial_rotary_factor=1.0))
    position = torch.tensor([1])
    cpu = torch.device("cpu")

    stretched = RotaryEmbedding(config, cpu).rotations(position)[0, 0]
    usual = RotaryEmbedding(plain, cpu).rotations(position)[0, 0]

    torch.testing.assert_close(stretched.abs(), torch.full((16,), yarn.attention_factor))
    torch.testing.assert_close(stretched[0].angle(), usual[0].angle())
    torch.testing.assert_close(stretched[-1].angle(), usual[-1].angle() / 4)
