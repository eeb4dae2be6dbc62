"""Staged states and memory arithmetic."""

import torch

from tests.unit.harness_checkpoint import tiny_config
from workers.model.cache import SequenceCache, kv_bytes_per_token, state_bytes_per_sequence
from workers.model.config import ModelConfig


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


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    config = ModelConfig.from_dict(tiny_config())

    assert kv_bytes_per_token(config, 2) * 2 == kv_bytes_per_token(config, 1)
    assert kv_bytes_per_token(config, 4) == kv_bytes_per_token(config, 2)
