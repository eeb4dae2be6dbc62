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

from workers.model.config import LayerType, ModelConfig
from workers.model.packed import PackedShard
from workers.model.shards import SequenceShard, ShardShapes, cut, join, unpack


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

    `dtype` is that of the convolution window; the delta rule's state is float32. Up to two more
    copies exist for each sequence of the running step.
    """
    channels = conv_channels(config, tp_size)
    window = (config.linear_conv_kernel - 1) * channels * dtype.itemsize
    matrix = config.linear_value_size // tp_size * config.linear_key_head_dim * 4
    return config.layer_types.count(LayerType.LINEAR) * (window + matrix)


def conv_channels(config: ModelConfig, tp_size: int) -> int:
    """Return the channels of one rank's causal convolution: queries, keys and values."""
    return (2 * config.linear_key_size + config.linear_value_size) // tp_size


@dataclass(frozen=True, slots=True)
class States:
    """The recurrent states of some sequences, in all linear layers or in one."""

    conv: Tensor  # [linear layers, S, J, C], the last J inputs of the convolution
    matrix: Tensor  # [linear layers, S, VH, DK, DV], float32

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self.conv.nbytes + self.matrix.nbytes

    def at(self, place: int) -> "States":
        """Return one sequence's states in all layers: a view."""
        return States(self.conv[:, place], self.matrix[:, place])

    def select(self, index: int | slice) -> "States":
        """Return some layers', or of one layer some sequences' states."""
        return States(self.conv[index], self.matrix[index])


@dataclass(frozen=True, slots=True)
class StagedStates:
    """What a step reads (`before`) and writes (`after`); they may be the same private copy."""

    before: States
    after: States

    def layer(self, linear_layer: int) -> "StagedStates":
        """Return those of the i-th linear layer, without the first dimension."""
        return StagedStates(self.before.select(linear_layer), self.after.select(linear_layer))


class SequenceCache:
    """KV blocks for full-attention layers, state blocks for linear layers; of one rank.

    Checkpoints are states set aside for later sequences, on a device of their own if wanted.

    While the same sequences run step after step, their committed states stay in the layout of the
    step (resident) instead of being written to their blocks and read again: on a CPU that would
    take longer than the delta rule itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_kv_blocks: int,
        block_tokens: int,
        num_state_blocks: int,
        num_checkpoints: int = 0,
        checkpoint_device: torch.device | None = None,
        tp_size: int = 1,
        rank: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.rank = rank
        self.tp_size = tp_size
        self._config = config
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
        value_heads = config.linear_num_value_heads // tp_size
        matrix = (value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
        window = (self.conv_window, conv_channels(config, tp_size))

        def states(num_blocks: int, device: torch.device | None) -> States:
            return States(
                torch.zeros((num_linear, num_blocks, *window), dtype=dtype, device=device),
                torch.zeros((num_linear, num_blocks, *matrix), device=device),
            )

        self._states = states(num_state_blocks, device)
        self._checkpoints = states(num_checkpoints, checkpoint_device or device)
        self._kv_layers: list[Tensor] = list(self._kv)
        self._staged: list[tuple[tuple[int, ...], States]] = []
        self._resident: dict[tuple[int, ...], States] = {}  # newer than their blocks
        self._spare: dict[tuple[int, ...], States] = {}  # the residents before those, to write into

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks and checkpoints."""
        return self._kv.nbytes + self._states.num_bytes + self._checkpoints.num_bytes

    def kv(self, full_layer: int) -> Tensor:
        """Return [blocks, block_tokens, 2, G, head size] of the i-th full-attention layer."""
        return self._kv_layers[full_layer]

    def stage(self, state_blocks: Sequence[int], fresh: Sequence[int]) -> StagedStates:
        """Lay out the states of a step's sequences; those at the indices `fresh` begin at zero."""
        blocks = tuple(state_blocks)
        before = None if fresh else self._resident.get(blocks)
        if before is None:
            self.settle()
            before = after = self._gather(blocks, fresh)
        elif blocks in self._spare:
            after = self._spare.pop(blocks)
        else:
            after = States(torch.empty_like(before.conv), torch.empty_like(before.matrix))
        self._staged.append((blocks, after))
        return StagedStates(before, after)

    def commit(self) -> None:
        """Make the states of the step visible to the next one."""
        for blocks, after in self._staged:
            if blocks in self._resident:
                self._spare[blocks] = self._resident[blocks]
            self._resident[blocks] = after
        self._staged.clear()

    def discard(self) -> None:
        """Forget the states of a step that failed; the last committed ones stay."""
        self._staged.clear()

    def settle(self) -> None:
        """Write committed states into their blocks, for whoever reads those."""
        for blocks, states in self._resident.items():
            index_S = self._index(blocks)
            self._states.conv.index_copy_(1, index_S, states.conv)
            self._states.matrix.index_copy_(1, index_S, states.matrix)
        self._resident.clear()
        self._spare.clear()

    def copy_aside(
        self, state_block: int, kv_blocks: Sequence[int], start: int, position: int
    ) -> SequenceShard:
        """Copy a sequence's committed states, and its KV rows from `start` on, to host memory."""
        return self._aside(self._committed(state_block), kv_blocks, start, position)

    def copy_kept_aside(self, place: int, kv_blocks: Sequence[int], position: int) -> SequenceShard:
        """Copy a checkpoint, and all KV rows before it, to host memory."""
        return self._aside(self._checkpoints.at(place), kv_blocks, 0, position)

    def _aside(
        self, states: States, kv_blocks: Sequence[int], start: int, position: int
    ) -> SequenceShard:
        heads = ShardShapes(self._config, self.rank, self.tp_size).num_sent_kv_heads
        block_N, offset_N = self._places(kv_blocks, start, position)
        kv = self._kv[:, block_N, offset_N, :, :heads].transpose(0, 1)
        host = torch.device("cpu")
        return SequenceShard(
            kv.to(host).contiguous(),
            states.conv.to(host, copy=True).contiguous(),
            states.matrix.to(host, copy=True).contiguous(),
        )

    def restore(
        self, state_block: int, kv_blocks: Sequence[int], shards: Sequence[PackedShard]
    ) -> None:
        """Write what the ranks of some gateway copied aside, all rows from 0 on, into a sequence.

        Raises SnapshotError when it is not of this model.
        """
        whole = join([unpack(shard, self._config) for shard in shards], self._config)
        mine = cut(whole, self._config, rank=self.rank, size=self.tp_size)
        self.settle()
        block_N, offset_N = self._places(kv_blocks, 0, whole.kv.shape[0])
        self._kv[:, block_N, offset_N] = mine.kv.transpose(0, 1).to(self._kv)
        self._states.conv[:, state_block] = mine.conv.to(self._states.conv)
        self._states.matrix[:, state_block] = mine.matrix.to(self._states.matrix)

    def _places(self, kv_blocks: Sequence[int], start: int, position: int) -> tuple[Tensor, Tensor]:
        """Return the blocks of some positions, and the places in them."""
        position_N = torch.arange(start, position, device=self._kv.device)
        block_N = self._index(tuple(kv_blocks))[position_N // self.block_tokens]
        return block_N, position_N % self.block_tokens

    def _committed(self, state_block: int) -> States:
        """Return the newest committed states of one sequence, wherever they lie: a view."""
        for blocks, states in self._resident.items():
            if state_block in blocks:
                return states.at(blocks.index(state_block))
        return self._states.at(state_block)

    def save_state(self, state_block: int, place: int) -> None:
        """Copy a sequence's committed state to a checkpoint's place."""
        _copy(self._committed(state_block), self._checkpoints.at(place))

    def load_state(self, place: int, state_block: int) -> None:
        """Copy a checkpoint into a state block; the checkpoint stays."""
        self.settle()
        _copy(self._checkpoints.at(place), self._states.at(state_block))

    def copy_kv_block(self, source: int, target: int) -> None:
        """Copy all keys and values of a block."""
        self._kv[:, target] = self._kv[:, source]

    def _gather(self, blocks: tuple[int, ...], fresh: Sequence[int]) -> States:
        index_S = self._index(blocks)
        states = States(
            self._states.conv.index_select(1, index_S),
            self._states.matrix.index_select(1, index_S),
        )
        for index in fresh:
            states.conv[:, index] = 0
            states.matrix[:, index] = 0
        return states

    def _index(self, blocks: tuple[int, ...]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._states.matrix.device)


def _copy(source: States, target: States) -> None:
    target.conv.copy_(source.conv)
    target.matrix.copy_(source.matrix)
