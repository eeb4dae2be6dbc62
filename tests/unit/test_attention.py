"""Paged causal attention against its definition."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.unit.harness_step import (
    BLOCK_TOKENS,
    BLOCKS_PER_SEQUENCE,
    CacheShape,
    plan,
    segment,
)
from tests.unit.test_delta_net import cuda_kernels_on_fakes
from workers.model.kernels import Kernels
from workers.model.step import StepPlan
from workers.model.torch_kernels import TorchKernels

HEADS, KV_HEADS, SIZE, SEQUENCES = 6, 2, 8, 6


def define_attention(laid_out: StepPlan, q: Tensor, kv: Tensor) -> Tensor:
    """Each row attends to all positions of its sequence up to its own."""
    outputs, row = [], 0
    for s in laid_out.segments:
        for position in range(s.start, s.start + len(s.token_ids)):
            cached = torch.stack(
                [kv[s.kv_blocks[p // BLOCK_TOKENS], p % BLOCK_TOKENS] for p in range(position + 1)]
            )
            k, v = cached.repeat_interleave(HEADS // KV_HEADS, 2).unbind(1)
            scores = torch.einsum("hc,phc->hp", q[row], k) * SIZE**-0.5
            outputs.append(torch.einsum("hp,phc->hc", functional.softmax(scores, -1), v))
            row += 1
    return torch.stack(outputs)


@pytest.mark.parametrize("kernels", [TorchKernels(), cuda_kernels_on_fakes()])
@pytest.mark.parametrize(
    "segments",
    [
        [segment(0, 7, 1)],
        [segment(0, 0, 1)],
        [segment(i, n, 1) for i, n in enumerate((2, 150, 149, 40, 8, 3))],
        [segment(0, 0, 20)],
        [segment(0, 13, 20)],
        [segment(0, 5, 9), segment(1, 6, 1), segment(2, 0, 5), segment(3, 63, 1)],
    ],
    ids=["one decoded", "first token", "unlike lengths", "from the start", "later", "mixed"],
)
def test_rows_attend_to_their_own_past(kernels: Kernels, segments: list) -> None:
    torch.manual_seed(0)
    laid_out = plan(segments)
    q = torch.randn(laid_out.num_rows, HEADS, SIZE)
    kv = torch.randn(SEQUENCES * BLOCKS_PER_SEQUENCE, BLOCK_TOKENS, 2, KV_HEADS, SIZE)

    y = kernels.attention(q, kv, kernels.prepare(laid_out, CacheShape()))

    torch.testing.assert_close(y, define_attention(laid_out, q, kv), atol=1e-5, rtol=1e-5)
