"""Staged states and memory arithmetic."""

from pathlib import Path

import pytest
import torch

from tests.unit.harness_checkpoint import tiny_config
from workers.model.cache import SequenceCache, kv_bytes_per_token, state_bytes_per_sequence
from workers.model.config import ModelConfig

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "qwen3.5-397b-a17b" / "config.json"


def make_cache(**sizes: int) -> SequenceCache:
    config = ModelConfig.from_dict(tiny_config())
    return SequenceCache(
        config, **({"num_kv_blocks": 6, "block_tokens": 4, "num_state_blocks": 5} | sizes)
    )


def step(cache: SequenceCache, blocks: list[int], value: float, fresh: bool = False) -> None:
    """One step that writes a value into all states, and everything else that it may write."""
    staged = cache.stage(blocks, range(len(blocks)) if fresh else [])
    staged.after.conv.fill_(value)
    staged.after.matrix.fill_(value)


def read(cache: SequenceCache, *blocks: int) -> list[float]:
    """What the next step would see, which is then discarded."""
    states = cache.stage(blocks, []).before
    cache.discard()

    assert torch.equal(states.conv[0, :, 0, 0], states.matrix[0, :, 0, 0, 0])
    return states.conv[-1, :, 0, 0].tolist()


def test_states_are_seen_after_commit_only() -> None:
    cache = make_cache()
    step(cache, [1, 3], 1.0, fresh=True)
    cache.discard()
    assert read(cache, 1, 3) == [0.0, 0.0]

    for value in (1.0, 2.0, 3.0):  # the same sequences, step after step
        step(cache, [1, 3], value)
        cache.commit()
        step(cache, [1, 3], -1.0)
        cache.discard()

        assert read(cache, 1, 3) == [value, value]


def test_states_follow_their_sequences_into_other_steps() -> None:
    cache = make_cache()
    for blocks, value in (([0, 1, 2], 1.0), ([1], 2.0), ([2, 1], 3.0), ([0], 4.0)):
        step(cache, blocks, value)
        cache.commit()
        step(cache, blocks, -1.0)
        cache.discard()

    assert read(cache, 2, 0, 1, 4) == [3.0, 4.0, 3.0, 0.0]


def test_all_micro_batches_of_a_step_are_committed_together() -> None:
    cache = make_cache()
    for value in (1.0, 2.0):
        step(cache, [2], value)
        step(cache, [4], 10 * value)
        cache.commit()
    step(cache, [2], 3.0)
    step(cache, [0], 30.0)
    cache.commit()

    assert read(cache, 0, 2, 4) == [30.0, 3.0, 20.0]


def test_a_fresh_sequence_begins_from_zero_whatever_its_block_held() -> None:
    cache = make_cache()
    step(cache, [0, 1], 7.0)
    cache.commit()

    before = cache.stage([0, 1], [1]).before

    assert before.matrix[:, 0].min() == before.conv[:, 0].min() == 7.0
    assert not before.matrix[:, 1].any()
    assert not before.conv[:, 1].any()


def test_memory_arithmetic_is_what_a_cache_takes() -> None:
    config = ModelConfig.from_dict(tiny_config())

    for size in (1, 2, 4):
        cache = SequenceCache(
            config, num_kv_blocks=6, block_tokens=4, num_state_blocks=5, tp_size=size
        )
        kv = 24 * kv_bytes_per_token(config, size)
        assert cache.num_bytes == kv + 5 * state_bytes_per_sequence(config, size)


@pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published files are not beside the repository"
)
def test_the_published_models_memory_is_what_its_shapes_say() -> None:
    config = ModelConfig.load(PUBLISHED.parent)
    bf16 = torch.bfloat16

    def allocated(size: int, **blocks: int) -> int:
        """Bytes that a rank's cache takes, on a device without memory."""
        sizes = {"num_kv_blocks": 0, "num_state_blocks": 0, "block_tokens": 16} | blocks
        meta = torch.device("meta")
        return SequenceCache(config, tp_size=size, dtype=bf16, device=meta, **sizes).num_bytes

    # KV: 15 layers of 2 heads of 256 for keys and values. States: 45 layers of 64 x 128 x 128
    # float32 and of 3 x 12288 convolution inputs.
    assert allocated(1, num_kv_blocks=1) == 16 * 30_720
    assert allocated(1, num_state_blocks=1) == 192_061_440
    for size in (1, 2, 4, 8, 16):
        kv, state = allocated(size, num_kv_blocks=1), allocated(size, num_state_blocks=1)
        assert kv == 16 * 30_720 // min(size, 2)  # the KV heads are two
        assert state == allocated(size, num_checkpoints=1) == 192_061_440 // size
        assert kv == 16 * kv_bytes_per_token(config, size, bf16)
        assert state == state_bytes_per_sequence(config, size, bf16)
    whole_context = allocated(1, num_kv_blocks=262_144 // 16, num_state_blocks=1)
    assert whole_context == 262_144 * 30_720 + 192_061_440


def test_a_checkpoint_is_a_copy_also_of_what_is_not_in_its_block_yet() -> None:
    cache = make_cache(num_checkpoints=2)
    for value in (1.0, 2.0):  # resident from the second step on
        step(cache, [1, 3], value)
        cache.commit()
    cache.save_state(3, 1)
    step(cache, [1, 3], 5.0)
    cache.commit()
    cache.load_state(1, 0)

    assert read(cache, 0, 1, 3) == [2.0, 5.0, 5.0]
    step(cache, [0], 7.0)
    cache.commit()
    cache.load_state(1, 3)
    assert read(cache, 0, 3) == [7.0, 2.0]


def test_a_copied_kv_block_is_the_same_in_all_layers() -> None:
    cache = make_cache()
    cache.kv(0)[2] = torch.randn_like(cache.kv(0)[2])
    cache.copy_kv_block(2, 5)
    copied = cache.kv(0)[5].clone()
    cache.kv(0)[2] = 0

    assert copied.any()
    assert torch.equal(cache.kv(0)[5], copied)


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    config = ModelConfig.from_dict(tiny_config())

    assert kv_bytes_per_token(config, 2) * 2 == kv_bytes_per_token(config, 1)
    assert kv_bytes_per_token(config, 4) == kv_bytes_per_token(config, 2)
