"""The delta rule and its convolution against their definitions, token by token."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.unit.harness_step import CacheShape, plan, segment
from workers.model.cache import StagedStates, States
from workers.model.cuda_kernels import CudaKernels, CudaLibraries
from workers.model.delta_inputs import DeltaInputs
from workers.model.kernels import Kernels
from workers.model.step import StepPlan
from workers.model.torch_kernels import TorchKernels

KEY_HEADS, HEADS, KEY_SIZE, SIZE, CHANNELS, KERNEL = 2, 6, 8, 5, 11, 4


def define_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, for one sequence: q, k [T, VH, DK], v [T, VH, DV], state [VH, DK, DV]."""
    outputs = []
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        update = (v[t] - torch.einsum("hkv,hk->hv", state, k[t])) * beta[t][:, None]
        state = state + k[t][:, :, None] * update[:, None]
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outputs), state


class FakePagedAttention:
    """FlashInfer's wrapper by its documented signature, in plain torch."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        assert q_data_type == kv_data_type
        for indices in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert indices.dtype == torch.int32
        self._shape = (num_qo_heads, num_kv_heads, head_dim_qk)
        self._plan = [x.tolist() for x in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)]
        self._pages, self._page_size = paged_kv_indices.long(), page_size

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        heads, kv_heads, size = self._shape
        assert q.shape[1:] == (heads, size)
        queries, pages, last = self._plan
        parts = []
        for i in range(len(last)):
            table = self._pages[pages[i] : pages[i + 1]]
            length = (len(table) - 1) * self._page_size + last[i]
            k, v = (c[table].reshape(-1, kv_heads, size)[:length] for c in paged_kv_cache)
            rows = q[queries[i] : queries[i + 1]]
            ahead = torch.ones(len(rows), length, dtype=torch.bool).tril(length - len(rows))
            parts.append(
                functional.scaled_dot_product_attention(
                    rows.transpose(0, 1),
                    k.repeat_interleave(heads // kv_heads, 1).transpose(0, 1),
                    v.repeat_interleave(heads // kv_heads, 1).transpose(0, 1),
                    attn_mask=ahead,
                ).transpose(0, 1)
            )
        return torch.cat(parts)


def fake_fused_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention by its documented signature; value heads may outnumber key heads."""
    assert output_final_state
    repeat = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(repeat, 2) for x in (scale * q, k))
    done = [define_delta_rule(*x) for x in zip(q, k, v, g, beta, initial_state, strict=True)]
    return torch.stack([o for o, _ in done]), torch.stack([s for _, s in done])


def fake_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor,
    output_final_state: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same for one packed batch; as many key heads as value heads."""
    assert output_final_state
    assert q.shape[0] == 1
    assert q.shape[:3] == k.shape[:3] == v.shape[:3]
    bounds = cu_seqlens.tolist()
    done = [
        define_delta_rule(scale * q[0, a:b], k[0, a:b], v[0, a:b], g[0, a:b], beta[0, a:b], s)
        for a, b, s in zip(bounds, bounds[1:], initial_state, strict=False)
    ]
    return torch.cat([o for o, _ in done])[None], torch.stack([s for _, s in done])


def cuda_kernels_on_fakes() -> CudaKernels:
    return CudaKernels(
        CudaLibraries(
            chunk_gated_delta_rule=fake_chunk,
            fused_recurrent_gated_delta_rule=fake_fused_recurrent,
            paged_attention=FakePagedAttention(),
        )
    )


IN_PLACE = pytest.mark.parametrize("in_place", [True, False])
KERNELS = pytest.mark.parametrize("kernels", [TorchKernels(), cuda_kernels_on_fakes()])
STEPS = pytest.mark.parametrize(
    "laid_out",
    [
        plan([segment(0, 7, 1)]),
        plan([segment(i, 3 + i, 1) for i in range(5)]),
        plan([segment(0, 0, 1)]),
        plan([segment(0, 0, 64)]),
        plan([segment(0, 64, 200)]),
        plan([segment(0, 0, 3), segment(1, 9, 1), segment(2, 5, 70), segment(3, 2, 1)]),
    ],
    ids=["one decoded", "five decoded", "first token", "whole chunk", "several chunks", "mixed"],
)


def staged(
    *, conv: Tensor | None = None, matrix: Tensor | None = None, in_place: bool = False
) -> StagedStates:
    """States of one layer, of which a test needs one kind."""
    unused = torch.empty(0)
    before = States(unused if conv is None else conv, unused if matrix is None else matrix)
    if in_place:
        return StagedStates(before, before)
    return StagedStates(
        before, States(*(torch.full_like(x, torch.nan) for x in (before.conv, before.matrix)))
    )


def draw_inputs(num_rows: int) -> DeltaInputs:
    return DeltaInputs(
        qk=functional.normalize(torch.randn(num_rows, 2, KEY_HEADS, KEY_SIZE), dim=-1),
        v=torch.randn(num_rows, HEADS, SIZE),
        log_decay=-torch.rand(num_rows, HEADS) * torch.tensor([0.01, 0.1, 1, 5, 20, 80]),
        beta=torch.rand(num_rows, HEADS),
    )


def rows_of(laid_out: StepPlan) -> list[slice]:
    bounds, row = [], 0
    for s in laid_out.segments:
        bounds.append(slice(row, row + len(s.token_ids)))
        row += len(s.token_ids)
    return bounds


@KERNELS
@STEPS
@IN_PLACE
def test_the_delta_rule_is_the_recurrence(
    kernels: Kernels, laid_out: StepPlan, in_place: bool
) -> None:
    torch.manual_seed(0)
    inputs = draw_inputs(laid_out.num_rows)
    state = torch.randn(len(laid_out.segments), HEADS, KEY_SIZE, SIZE)
    states = staged(matrix=state, in_place=in_place)
    q, k = inputs.qk.repeat_interleave(HEADS // KEY_HEADS, 2).unbind(1)
    expected = [
        define_delta_rule(q[r], k[r], inputs.v[r], inputs.log_decay[r], inputs.beta[r], s)
        for r, s in zip(rows_of(laid_out), state, strict=True)
    ]

    o = kernels.delta_rule(inputs, states, kernels.prepare(laid_out, CacheShape()))

    torch.testing.assert_close(o, torch.cat([e for e, _ in expected]), atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(
        states.after.matrix, torch.stack([s for _, s in expected]), atol=3e-5, rtol=1e-5
    )


def test_repeated_tokens_do_not_hurt_the_chunked_form() -> None:
    """All keys the same and nothing forgotten: where an inverse by powers overflows."""
    laid_out = plan([segment(0, 0, 64)])
    inputs = DeltaInputs(
        qk=torch.ones(64, 2, 1, KEY_SIZE) * KEY_SIZE**-0.5,
        v=torch.randn(64, 1, SIZE),
        log_decay=torch.zeros(64, 1),
        beta=torch.full((64, 1), 0.99),
    )
    state = torch.zeros(1, 1, KEY_SIZE, SIZE)
    q, k = inputs.qk.unbind(1)
    expected, _ = define_delta_rule(q, k, inputs.v, inputs.log_decay, inputs.beta, state[0])
    kernels = TorchKernels()

    o = kernels.delta_rule(inputs, staged(matrix=state), kernels.prepare(laid_out, CacheShape()))

    torch.testing.assert_close(o, expected, atol=1e-4, rtol=1e-4)


@KERNELS
@STEPS
@IN_PLACE
def test_the_convolution_is_causal_and_remembers(
    kernels: Kernels, laid_out: StepPlan, in_place: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(laid_out.num_rows, CHANNELS)
    weight = torch.randn(KERNEL, CHANNELS)
    conv = torch.randn(len(laid_out.segments), KERNEL - 1, CHANNELS)
    states = staged(conv=conv, in_place=in_place)
    expected, tails = [], []
    for rows, past in zip(rows_of(laid_out), conv, strict=True):
        history = torch.cat([past, x[rows]])
        expected += [
            (history[i : i + KERNEL] * weight).sum(0) for i in range(rows.stop - rows.start)
        ]
        tails.append(history[-(KERNEL - 1) :])

    y = kernels.causal_conv(x, weight, states, kernels.prepare(laid_out, CacheShape(KERNEL - 1)))

    torch.testing.assert_close(y, functional.silu(torch.stack(expected)))
    assert torch.equal(states.after.conv, torch.stack(tails))
