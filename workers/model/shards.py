"""A sequence's cache, cut over the ranks of a gateway: packed, and put together for other ranks.

Shards are in terms of logical heads, so that what T ranks wrote is read by T' ranks: `join` makes
the whole of T shards, `cut` takes a rank's share of it.

Shape legend: N positions, F full-attention layers, L linear layers, J conv kernel - 1, C conv
channels (queries, keys, values, one after the other), VH value heads, DK / DV key and value size,
G KV heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import SnapshotError
from workers.model.config import LayerType, ModelConfig
from workers.model.packed import PackedShard

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class SequenceShard:
    """One rank's share of one sequence's cache at a committed position, in host memory."""

    kv: Tensor  # [N, F, 2, G, head size]
    conv: Tensor  # [L, J, C]
    matrix: Tensor  # [L, VH, DK, DV], float32


@dataclass(frozen=True, slots=True)
class ShardShapes:
    """What a shard of rank `rank` of `size` holds."""

    config: ModelConfig
    rank: int = 0
    size: int = 1

    @property
    def kv_heads(self) -> slice:
        """The KV heads that the rank computes with."""
        heads = self.config.num_kv_heads
        first = self.rank * heads // self.size
        return slice(first, first + max(1, heads // self.size))

    @property
    def num_sent_kv_heads(self) -> int:
        """The KV heads that the rank sends: none where a rank before it holds the same ones."""
        before = ShardShapes(self.config, self.rank - 1, self.size).kv_heads
        heads = self.kv_heads
        return 0 if self.rank and before == heads else heads.stop - heads.start

    @property
    def conv_segments(self) -> tuple[int, int, int]:
        """Channels of the rank's queries, keys and values."""
        keys = self.config.linear_key_size // self.size
        return keys, keys, self.config.linear_value_size // self.size

    @property
    def value_heads(self) -> slice:
        """The value heads of the rank."""
        share = self.config.linear_num_value_heads // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def kv(self, num_rows: int) -> tuple[int, ...]:
        """Shape of the keys and values of some positions, as they are sent."""
        full = self.config.layer_types.count(LayerType.FULL)
        return (num_rows, full, 2, self.num_sent_kv_heads, self.config.head_dim)

    @property
    def conv(self) -> tuple[int, ...]:
        """Shape of the convolution's windows."""
        linear = self.config.layer_types.count(LayerType.LINEAR)
        return (linear, self.config.linear_conv_kernel - 1, sum(self.conv_segments))

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the delta rule's states."""
        config, heads = self.config, self.value_heads
        linear = config.layer_types.count(LayerType.LINEAR)
        sizes = (config.linear_key_head_dim, config.linear_value_head_dim)
        return (linear, heads.stop - heads.start, *sizes)


def pack(shard: SequenceShard, *, rank: int, size: int, start: int) -> PackedShard:
    """Return a shard, whose first KV row is that of position `start`, as bytes."""
    return PackedShard(
        rank=rank,
        size=size,
        start=start,
        position=start + shard.kv.shape[0],
        dtype=str(shard.conv.dtype).removeprefix("torch."),
        kv=_bytes_of(shard.kv),
        states=_bytes_of(shard.conv) + _bytes_of(shard.matrix),
    )


def unpack(packed: PackedShard, config: ModelConfig) -> SequenceShard:
    """Return the tensors of a shard; raises SnapshotError when it is not of this model."""
    shapes = ShardShapes(config, packed.rank, packed.size)
    dtype = _DTYPES.get(packed.dtype)
    if dtype is None:
        raise SnapshotError(f"a shard's dtype is {packed.dtype!r}, not one of {list(_DTYPES)}")
    kv, rest = _read(packed.kv, shapes.kv(packed.position - packed.start), dtype)
    conv, states = _read(packed.states, shapes.conv, dtype)
    matrix, more = _read(states, shapes.matrix, torch.float32)
    if rest or more:
        raise SnapshotError(f"the shard of rank {packed.rank} of {packed.size} is too long")
    return SequenceShard(kv, conv, matrix)


def are_whole(shards: Sequence[PackedShard], config: ModelConfig) -> bool:
    """Whether these are the shards of all ranks of one gateway, whole, of this model."""
    size, position = len(shards), max((s.position for s in shards), default=0)
    if not position or config.linear_num_key_heads % size:
        return False
    return all(
        (shard.rank, shard.size, shard.start, shard.position) == (rank, size, 0, position)
        and _num_bytes(shard, config) == (len(shard.kv), len(shard.states))
        for rank, shard in enumerate(shards)
    )


def join(shards: Sequence[SequenceShard], config: ModelConfig) -> SequenceShard:
    """Put the shards of all ranks, in their order, together."""
    segments = list(ShardShapes(config, 0, len(shards)).conv_segments)
    by_rank = [torch.split(shard.conv, segments, dim=-1) for shard in shards]
    by_segment = zip(*by_rank, strict=True)
    return SequenceShard(
        torch.cat([shard.kv for shard in shards], dim=3),
        torch.cat([part for parts in by_segment for part in parts], dim=-1),
        torch.cat([shard.matrix for shard in shards], dim=1),
    )


def cut(whole: SequenceShard, config: ModelConfig, *, rank: int, size: int) -> SequenceShard:
    """Return what one rank holds of the whole; views of it."""
    shapes = ShardShapes(config, rank, size)
    whole_segments = ShardShapes(config).conv_segments
    parts = torch.split(whole.conv, list(whole_segments), dim=-1)
    mine = [
        part[..., rank * share : (rank + 1) * share]
        for part, share in zip(parts, shapes.conv_segments, strict=True)
    ]
    return SequenceShard(
        whole.kv[:, :, :, shapes.kv_heads],
        torch.cat(mine, dim=-1),
        whole.matrix[:, shapes.value_heads],
    )


def _num_bytes(packed: PackedShard, config: ModelConfig) -> tuple[int, int]:
    """Return how many bytes of rows and of states a shard must have; none of a strange dtype."""
    shapes, dtype = ShardShapes(config, packed.rank, packed.size), _DTYPES.get(packed.dtype)
    if dtype is None:
        return -1, -1
    rows, conv, matrix = (
        torch.Size(shape).numel()
        for shape in (shapes.kv(packed.position - packed.start), shapes.conv, shapes.matrix)
    )
    return rows * dtype.itemsize, conv * dtype.itemsize + matrix * torch.float32.itemsize


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _read(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bytes]:
    """Return the tensor at the head of some bytes, and the bytes behind it."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if len(data) < num_bytes:
        raise SnapshotError(f"a shard has {len(data)} bytes where {num_bytes} are needed")
    if not num_bytes:
        return torch.empty(shape, dtype=dtype), data
    head = torch.frombuffer(bytearray(data[:num_bytes]), dtype=torch.uint8)
    return head.view(dtype).view(shape), data[num_bytes:]
