"""Rotary position embedding of the leading dimensions of a head, with static YaRN.

For text, the interleaved three-axis embedding of the published models has equal positions on all
axes and is therefore the ordinary one. Pairs are kept next to each other (see `pair_rows`), so that
a rotation is one product of complex numbers.

Shape legend: R rows, H heads, C head size, F frequencies (half the rotary dimensions).
"""

import math

import torch
from torch import Tensor

from workers.model.config import ModelConfig, YarnConfig


class RotaryEmbedding:
    """Turns positions into rotations, once a step; all full-attention layers share them."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        frequencies_F = 1.0 / config.rope.theta ** (
            torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
        )
        self._scale = 1.0
        if config.rope.yarn is not None:
            frequencies_F = _stretch(frequencies_F, config.rope.theta, config.rope.yarn)
            self._scale = config.rope.yarn.attention_factor
        self._frequencies_F = frequencies_F.to(device)

    def rotations(self, positions_R: Tensor) -> Tensor:
        """Return the complex factors [R, 1, F] of integer positions."""
        angles_RF = positions_R[:, None].float() * self._frequencies_F
        rotations_RF = torch.polar(torch.full_like(angles_RF, self._scale), angles_RF)
        return rotations_RF[:, None]


def rotate_(x_RHC: Tensor, rotations_R1F: Tensor) -> None:
    """Rotate the leading dimensions of float32 heads in place; pairs lie next to each other."""
    num_rows, num_heads, _ = x_RHC.shape
    rotary = x_RHC[..., : 2 * rotations_R1F.shape[-1]].view(num_rows, num_heads, -1, 2)
    torch.view_as_complex(rotary).mul_(rotations_R1F)


def pair_rows(weight_RD: Tensor, num_heads: int, rotary_dim: int) -> Tensor:
    """Reorder the rows of a head so that the two dimensions of each rotation are neighbours.

    Published heads pair dimension j with j + rotary_dim / 2. Queries and keys are reordered alike,
    which leaves their products as they are.
    """
    heads = weight_RD.reshape(num_heads, -1, weight_RD.shape[1])
    pairs = heads[:, :rotary_dim].reshape(num_heads, 2, -1, weight_RD.shape[1])
    rotary = pairs.transpose(1, 2).flatten(1, 2)
    return torch.cat([rotary, heads[:, rotary_dim:]], 1).flatten(0, 1)


def _stretch(frequencies_F: Tensor, theta: float, yarn: YarnConfig) -> Tensor:
    """Interpolate slow frequencies, keep fast ones, blend linearly between.

    Source: Peng et al., "YaRN", section 3.2; the rounding follows transformers modeling_rope_utils.
    """
    num = len(frequencies_F)

    def dimension(num_rotations: float) -> float:
        reach = yarn.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return num * math.log(reach) / math.log(theta)

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num - 1)
    ramp_F = (torch.arange(num, dtype=torch.float32) - low) / (high - low or 0.001)
    slow_F = ramp_F.clamp(0, 1)
    return frequencies_F / yarn.factor * slow_F + frequencies_F * (1 - slow_F)
