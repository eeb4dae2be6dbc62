"""What a gateway rank remembers of its sequences: paged keys and values, and recurrent states.

Keys and values are written in place: rows beyond the committed length of a sequence are harmless.
A recurrent state changes wholly with every token, so a step works on copies (`stage`) that become
visible all together (`commit`) or not at all (`discard`).

Shape legend: N rows, S sequences, J conv kernel - 1, C conv channels of this rank, VH value heads
of this rank, DK / DV key and value size, G KV heads of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.config import LayerType, ModelConfig


def kv_heads_per_rank(config: ModelConfig, tp_size: int) -> int:
    """Return the KV heads that one rank holds: at least one, replicated beyond their number."""
    return max(1, config.num_kv_heads // tp_size)


def kv_bytes_per_token(
    config: ModelConfig, tp_size: int, dtype: torch.dtype = torch.float32
) -> int:
    """Return the bytes that one token's keys and values take on one rank, in all layers."""
    num_layers = config.layer_types.count(LayerType.FULL)
    heads = kv_heads_per_rank(config, tp_size)
    return num_layers * 2 * heads * config.head_dim * dtype.itemsize


def state_bytes_per_sequence(
    config: ModelConfig, tp_size: int, dtype: torch.dtype = torch.float32
) -> int:
    """Return the bytes of one sequence's recurrent state on one rank, whatever its length.

    `dtype` is that of the convolution window; the delta rule's state is float32. A step holds a
    second copy for each sequence in it.
    """
    channels = conv_channels(config, tp_size)
    window = (config.linear_conv_kernel - 1) * channels * dtype.itemsize
    matrix = config.linear_value_size // tp_size * config.linear_key_head_dim * 4
    return config.layer_types.count(LayerType.LINEAR) * (window + matrix)


def conv_channels(config: ModelConfig, tp_size: int) -> int:
    """Return the channels of one rank's causal convolution: queries, keys and values."""
    return (2 * config.linear_key_size + config.linear_value_size) // tp_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedStates:
    """Private copies of the states of a step's sequences, changed in place by the layers."""

    blocks_S: Tensor  # int64
    window: Tensor  # [linear layers, S, J + 1, C]: first J rows before the step, last J after it
    matrix: Tensor  # [linear layers, S, VH, DK, DV], float32


class SequenceCache:
    """KV blocks for full-attention layers, state blocks for linear layers; of one rank."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_kv_blocks: int,
        block_tokens: int,
        num_state_blocks: int,
        tp_size: int = 1,
        rank: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.rank = rank
        self.block_tokens = block_tokens
        self.conv_window = config.linear_conv_kernel - 1
        num_full = config.layer_types.count(LayerType.FULL)
        num_linear = config.num_layers - num_full
        heads = kv_heads_per_rank(config, tp_size)
        self._kv = torch.zeros(
            (num_full, num_kv_blocks, block_tokens, 2, heads, config.head_dim),
            dtype=dtype,
            device=device,
        )
        self._conv = torch.zeros(
            (
                num_linear,
                num_state_blocks,
                config.linear_conv_kernel - 1,
                conv_channels(config, tp_size),
            ),
            dtype=dtype,
            device=device,
        )
        self._matrix = torch.zeros(
            (
                num_linear,
                num_state_blocks,
                config.linear_num_value_heads // tp_size,
                config.linear_key_head_dim,
                config.linear_value_head_dim,
            ),
            device=device,
        )
        self._kv_layers: list[Tensor] = list(self._kv)
        self._staged: list[StagedStates] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(t.numel() * t.element_size() for t in (self._kv, self._conv, self._matrix))

    def kv(self, full_layer: int) -> Tensor:
        """Return [blocks, block_tokens, 2, G, head size] of the i-th full-attention layer."""
        return self._kv_layers[full_layer]

    def stage(self, state_blocks: Sequence[int], fresh: Sequence[int]) -> StagedStates:
        """Copy the states of a step's sequences; those at the indices `fresh` begin from zero."""
        blocks_S = torch.tensor(state_blocks, dtype=torch.int64, device=self._matrix.device)
        staged = StagedStates(
            blocks_S=blocks_S,
            window=functional.pad(self._conv.index_select(1, blocks_S), (0, 0, 0, 1)),
            matrix=self._matrix.index_select(1, blocks_S),
        )
        for index in fresh:
            staged.window[:, index] = 0
            staged.matrix[:, index] = 0
        self._staged.append(staged)
        return staged

    def commit(self) -> None:
        """Make the states of the step visible to the next one."""
        for staged in self._staged:
            self._conv.index_copy_(1, staged.blocks_S, staged.window[:, :, 1:])
            self._matrix.index_copy_(1, staged.blocks_S, staged.matrix)
        self._staged.clear()

    def discard(self) -> None:
        """Forget the states of a step that failed; the last committed ones stay."""
        self._staged.clear()
