"""In bit-stable mode a row's logits are the same bits whatever else is computed beside it."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.harness_model import (
    Model,
    assert_close,
    draw_tokens,
    load_model,
    oracle_logits,
    published,
    write_oracle,
)
from workers.model.batch import CHUNK_TOKENS
from workers.model.decoder import DecoderOptions

STABLE = DecoderOptions(bit_stable=True)
PROMPT_TOKENS = {0: 1, 1: 20, 2: 64, 3: 65, 4: 100, 5: 130}
COMPLETION_TOKENS = 6


def next_tokens(done: int, token_ids: list[int], num_prompt: int) -> list[int]:
    """Cut as the scheduler does: one chunk of the prompt, then one completion token at a time."""
    if done >= num_prompt:
        return token_ids[done : done + 1]
    chunk_end = (done // CHUNK_TOKENS + 1) * CHUNK_TOKENS
    return token_ids[done : min(chunk_end, num_prompt)]


def serve(
    model: Model, sequences: dict[int, list[int]], prompts: dict[int, int], order: list[list[int]]
) -> dict[int, Tensor]:
    """Advance the sequences named in each step, then the rest together; returns their logits."""
    parts: dict[int, list[Tensor]] = {s: [] for s in sequences}
    steps = iter(order)
    while left := [s for s, t in sequences.items() if model.lengths.get(s, 0) < len(t)]:
        named = [s for s in next(steps, left) if s in left] or left
        work = [(s, next_tokens(model.lengths.get(s, 0), sequences[s], prompts[s])) for s in named]
        for (s, _), logits in zip(work, model.step(*work), strict=True):
            parts[s].append(logits)
    return {s: torch.cat(p) for s, p in parts.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stable")
    # Sizes that fill no vector register evenly.
    write_oracle(directory, published(hidden_size=36, moe_intermediate_size=10, vocab_size=99))
    return directory


@pytest.fixture(scope="module")
def alone(directory: Path) -> dict[int, Tensor]:
    """The logits of every sequence, each computed without company."""
    return {
        s: serve(load_model(directory, options=STABLE), {s: t}, PROMPT_TOKENS, [])[s]
        for s, t in sequences().items()
    }


def sequences() -> dict[int, list[int]]:
    return {s: draw_tokens(n + COMPLETION_TOKENS, 99, s) for s, n in PROMPT_TOKENS.items()}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_company_changes_no_bit(
    directory: Path, alone: dict[int, Tensor], micro_batches: int
) -> None:
    options = DecoderOptions(bit_stable=True, micro_batches=micro_batches)

    together = serve(load_model(directory, options=options), sequences(), PROMPT_TOKENS, [])

    for s, logits in together.items():
        assert torch.equal(alone[s], logits), s


@given(
    order=st.lists(
        st.permutations(list(PROMPT_TOKENS)).flatmap(
            lambda p: st.integers(1, len(p)).map(lambda n: list(p[:n]))
        ),
        max_size=12,
    )
)
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_order_of_steps_changes_no_bit(
    directory: Path, alone: dict[int, Tensor], order: list[list[int]]
) -> None:
    drawn = serve(load_model(directory, options=STABLE), sequences(), PROMPT_TOKENS, order)

    for s, logits in drawn.items():
        assert torch.equal(alone[s], logits), s


def test_bit_stable_logits_equal_transformers(tmp_path: Path) -> None:
    oracle = write_oracle(tmp_path, published())
    token_ids = draw_tokens(120, 301)
    model = load_model(tmp_path, options=STABLE)

    logits = serve(model, {0: token_ids}, {0: 100}, [])[0]

    assert_close(logits, oracle_logits(oracle, token_ids))


def test_a_segment_across_a_chunk_boundary_is_refused(directory: Path) -> None:
    model = load_model(directory, options=STABLE)

    with pytest.raises(AssertionError, match="crosses a chunk"):
        model.step((0, draw_tokens(65, 99)))
