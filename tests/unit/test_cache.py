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


def fill(cache: SequenceCache, blocks: list[int], value: float) -> None:
    staged = cache.stage(blocks, range(len(blocks)))
    staged.window.fill_(value)
    staged.matrix.fill_(value)
    cache.commit()


def read(cache: SequenceCache, block: int) -> tuple[float, float]:
    staged = cache.stage([block], [])
    cache.discard()
    return staged.window[0, 0, 0, 0].item(), staged.matrix.max().item()


def test_states_are_seen_after_commit_only() -> None:
    cache = make_cache()
    fill(cache, [1, 3], 1.0)
    staged = cache.stage([3], [])
    staged.matrix.fill_(2.0)
    staged.window.fill_(2.0)

    assert cache.stage([3], []).matrix.max() == 1.0
    cache.discard()

    assert read(cache, 3) == (1.0, 1.0)


def test_all_micro_batches_of_a_step_are_committed_together() -> None:
    cache = make_cache()
    for block in (2, 4):
        cache.stage([block], [0]).matrix.fill_(float(block))

    cache.commit()

    assert [read(cache, block)[1] for block in (2, 4)] == [2.0, 4.0]


def test_a_fresh_sequence_begins_from_zero_whatever_its_block_held() -> None:
    cache = make_cache()
    fill(cache, [0, 1], 7.0)

    staged = cache.stage([1, 0], [1])

    assert staged.matrix[:, 0].min() == 7.0
    assert not staged.matrix[:, 1].any()
    assert not staged.window[:, 1].any()


def test_the_window_moves_by_one_token() -> None:
    cache = make_cache()
    staged = cache.stage([2], [0])
    staged.window[:, 0] = torch.arange(4.0)[:, None]
    cache.commit()

    assert cache.stage([2], []).window[0, 0, :3, 0].tolist() == [1.0, 2.0, 3.0]


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
