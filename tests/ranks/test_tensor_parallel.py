"""The ranks of a gateway compute the same logits as one process and as transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.harness_model import (
    assert_close,
    draw_tokens,
    load_model,
    oracle_logits,
    published,
    write_oracle,
)
from tests.conformance.test_parity import model_settings
from tests.ranks.harness_pool import RankPool
from workers.mesh import TensorParallelGroup
from workers.model.decoder import DecoderOptions

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


def run_steps(
    group: TensorParallelGroup, directory: Path, steps: list[Any], options: DecoderOptions
) -> list[Tensor]:
    """Run the same steps on every rank; returns the logits of each piece of work."""
    model = load_model(directory, group, options=options)
    return [logits for step in steps for logits in model.step(*step)]


def check_ranks(
    pool: RankPool, size: int, directory: Path, steps: list[Any], options: DecoderOptions
) -> list[Tensor]:
    """Return what all ranks agree on, bit for bit."""
    first, *others = pool.run(size, run_steps, directory, steps, options)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)
    return first


def mixed_steps(token_ids: list[int]) -> list[Any]:
    """Steps with fewer rows than ranks, rows that do not divide, chunks beside decoded tokens."""
    return [
        [(0, token_ids[:1])],
        [(0, token_ids[1:3]), (1, token_ids[:65])],
        [(1, token_ids[65:66]), (2, token_ids[:30]), (0, token_ids[3:4])],
        [(0, token_ids[4:5]), (1, token_ids[66:67]), (2, token_ids[30:31])],
        [(2, token_ids[31:32])],
    ]


def by_sequence(steps: list[Any], results: list[Tensor]) -> dict[int, Tensor]:
    parts: dict[int, list[Tensor]] = {}
    for (sequence, _), logits in zip((w for step in steps for w in step), results, strict=True):
        parts.setdefault(sequence, []).append(logits)
    return {sequence: torch.cat(part) for sequence, part in parts.items()}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_equal_transformers(
    pool: RankPool, tmp_path: Path, size: int, micro_batches: int
) -> None:
    """With four ranks the two KV heads are replicated, and some ranks own no row."""
    oracle = write_oracle(tmp_path, published())
    token_ids = draw_tokens(70, 301)
    steps = mixed_steps(token_ids)

    results = check_ranks(pool, size, tmp_path, steps, DecoderOptions(micro_batches=micro_batches))

    expected = oracle_logits(oracle, token_ids)
    for logits in by_sequence(steps, results).values():
        assert_close(logits, expected[: len(logits)])


@pytest.mark.parametrize("size", [2, 4])
@given(data=st.data())
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_supported_model_is_the_same_on_several_ranks(
    pool: RankPool, tmp_path_factory: pytest.TempPathFactory, size: int, data: st.DataObject
) -> None:
    check_drawn_model(pool, tmp_path_factory, size, data.draw(model_settings(size)))


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", [1, 2, 4])
@given(data=st.data())
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_many_supported_models_are_the_same_on_several_ranks(
    pool: RankPool, tmp_path_factory: pytest.TempPathFactory, size: int, data: st.DataObject
) -> None:
    check_drawn_model(pool, tmp_path_factory, size, data.draw(model_settings(size)))


def check_drawn_model(
    pool: RankPool, tmp_path_factory: pytest.TempPathFactory, size: int, drawn: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("model")
    oracle = write_oracle(directory, drawn)
    token_ids = draw_tokens(70, drawn["vocab_size"])
    steps = mixed_steps(token_ids)

    results = check_ranks(pool, size, directory, steps, DecoderOptions())

    expected = oracle_logits(oracle, token_ids)
    for logits in by_sequence(steps, results).values():
        assert_close(logits, expected[: len(logits)])
