"""What T ranks copied aside is what T' ranks then hold, exactly."""

from dataclasses import replace

import pytest
import torch

from tests.unit.harness_checkpoint import tiny_config
from workers.errors import SnapshotError
from workers.model.cache import SequenceCache
from workers.model.config import ModelConfig
from workers.model.packed import PackedShard
from workers.model.shards import are_whole, pack, unpack

SIZES = (1, 2, 4)
POSITION = 11
BLOCKS = (3, 0, 5)  # of 4 tokens each
STATE = 2
CONFIG = ModelConfig.from_dict(tiny_config())


def whole(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """A sequence's keys and values, conv window and states, in logical heads."""
    draw = torch.Generator().manual_seed(3)
    kv = torch.randn(POSITION, 1, 2, 2, 8, generator=draw)
    conv = torch.randn(1, 3, 4 * 6 + 4 * 6 + 8 * 5, generator=draw)
    matrix = torch.randn(1, 8, 6, 5, generator=draw)
    return kv.to(dtype), conv.to(dtype), matrix


def held_by(rank: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What a rank holds of it, counted by hand: 2 KV heads, 4 key heads, 8 value heads."""
    kv, conv, matrix = whole(dtype)
    kv_heads = {1: [[0, 1]], 2: [[0], [1]], 4: [[0], [0], [1], [1]]}[size][rank]
    keys = [h * 6 + i for h in range(4) if h * size // 4 == rank for i in range(6)]
    values = [h * 5 + i for h in range(8) if h * size // 8 == rank for i in range(5)]
    channels = [*keys, *(24 + k for k in keys), *(48 + v for v in values)]
    heads = [h for h in range(8) if h * size // 8 == rank]
    return kv[:, :, :, kv_heads], conv[:, :, channels], matrix[:, heads]


def make_cache(rank: int, size: int, dtype: torch.dtype) -> SequenceCache:
    return SequenceCache(
        CONFIG, num_kv_blocks=6, block_tokens=4, num_state_blocks=4,
        tp_size=size, rank=rank, dtype=dtype,
    )  # fmt: skip


def fill(cache: SequenceCache, *, resident: bool) -> None:
    kv, conv, matrix = held_by(cache.rank, cache.tp_size, cache._kv.dtype)
    for position in range(POSITION):
        block, offset = divmod(position, 4)
        cache.kv(0)[BLOCKS[block], offset] = kv[position, 0]
    staged = cache.stage([1, STATE], [0, 1])
    staged.after.conv[:, 1] = conv
    staged.after.matrix[:, 1] = matrix
    cache.commit()
    if not resident:
        cache.settle()
    cache.stage([1, STATE], []).after.matrix.fill_(-1)  # a step that has not been decided
    cache.discard()


def shards_of(size: int, dtype: torch.dtype, *, resident: bool = True) -> list[PackedShard]:
    shards = []
    for rank in range(size):
        cache = make_cache(rank, size, dtype)
        fill(cache, resident=resident)
        first = pack(cache.copy_aside(STATE, BLOCKS, 0, 6), rank=rank, size=size, start=0)
        second = pack(cache.copy_aside(STATE, BLOCKS, 6, 11), rank=rank, size=size, start=6)
        shards.append(replace(second, start=0, kv=first.kv + second.kv))
    return shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("readers", SIZES)
@pytest.mark.parametrize("writers", SIZES)
def test_other_ranks_hold_exactly_what_the_unsharded_state_says(writers, readers, dtype) -> None:
    shards = shards_of(writers, dtype, resident=writers != 2)
    assert are_whole(shards, CONFIG)

    for rank in range(readers):
        cache = make_cache(rank, readers, dtype)
        other = (1, 4, 2)
        cache.stage([0, STATE], [0, 1]).after.matrix.fill_(7)  # somebody's before
        cache.commit()
        cache.restore(STATE, other, shards)

        kv, conv, matrix = held_by(rank, readers, dtype)
        states = cache.stage([STATE], []).before
        assert torch.equal(states.conv[:, 0], conv)
        assert torch.equal(states.matrix[:, 0], matrix)
        rows = [cache.kv(0)[other[p // 4], p % 4] for p in range(POSITION)]
        assert torch.equal(torch.stack(rows), kv[:, 0])


def test_a_checkpoint_is_copied_aside_like_the_sequence_that_left_it() -> None:
    cache = SequenceCache(
        CONFIG, num_kv_blocks=6, block_tokens=4, num_state_blocks=4, num_checkpoints=2
    )
    fill(cache, resident=True)
    cache.save_state(STATE, 1)
    aside = cache.copy_aside(STATE, BLOCKS, 0, POSITION)
    cache.stage([1, STATE], []).after.matrix.fill_(9)
    cache.commit()

    kept = cache.copy_kept_aside(1, BLOCKS, POSITION)
    assert torch.equal(kept.kv, aside.kv)
    assert torch.equal(kept.conv, aside.conv)
    assert torch.equal(kept.matrix, aside.matrix)
    assert len(kept.kv)


def test_a_copy_does_not_change_with_the_sequence() -> None:
    cache = make_cache(0, 1, torch.float32)
    fill(cache, resident=True)
    aside = cache.copy_aside(STATE, BLOCKS, 0, POSITION)
    cache.stage([1, STATE], []).after.matrix.fill_(9)
    cache.commit()
    cache._kv.fill_(9)
    cache._states.matrix.fill_(9)

    kv, conv, matrix = whole()
    assert torch.equal(aside.kv, kv)
    assert torch.equal(aside.conv, conv)
    assert torch.equal(aside.matrix, matrix)


def test_ranks_with_the_same_kv_head_send_it_once() -> None:
    sizes = [len(shard.kv) for shard in shards_of(4, torch.float32)]

    assert sizes == [POSITION * 2 * 8 * 4, 0, POSITION * 2 * 8 * 4, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"kv": b"1234"},
        {"states": b""},
        {"dtype": "int8"},
        {"position": 10},
        {"size": 2},
        {"rank": 1},
        {"start": 1},
    ],
)
def test_what_is_not_of_this_model_is_not_whole(change) -> None:
    (shard,) = shards_of(1, torch.float32)

    assert not are_whole([replace(shard, **change)], CONFIG)
    assert not are_whole([], CONFIG)
    assert not are_whole([shard, shard], CONFIG)
    if change.keys() <= {"kv", "states", "dtype", "position"}:
        with pytest.raises(SnapshotError):
            unpack(replace(shard, **change), CONFIG)


def test_a_digest_sees_every_bit_and_every_field() -> None:
    (shard,) = shards_of(1, torch.float32)
    flipped = bytes([shard.states[0] ^ 1]) + shard.states[1:]
    others = [
        replace(shard, states=flipped),
        replace(shard, kv=shard.kv[:-1] + b"x"),
        replace(shard, position=12),
        replace(shard, kv=shard.kv[:-4], states=shard.kv[-4:] + shard.states),
    ]

    assert len({s.digest() for s in (shard, *others)}) == 5
