"""The kernels of a GPU: flash-linear-attention for the delta rule, FlashInfer for paged attention.

NOT RUN where this was written, which has no GPU: the calls follow the documentation of the two
libraries (flash-linear-attention 0.5, FlashInfer 0.6), and the tests drive them through fakes of
the documented signatures. Queries, keys and values are bf16; decays and states are float32. The
convolution is plain torch over all rows at once. Shape legend: see kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.cache import SequenceCache, StagedStates
from workers.model.delta_inputs import DeltaInputs
from workers.model.step import StepPlan

WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaLibraries:
    """What is used of the two libraries."""

    chunk_gated_delta_rule: Callable[..., tuple[Tensor, Tensor]]
    fused_recurrent_gated_delta_rule: Callable[..., tuple[Tensor, Tensor]]
    paged_attention: Any  # flashinfer.BatchPrefillWithPagedKVCacheWrapper


def load_libraries(device: torch.device) -> CudaLibraries:
    """Import the libraries; raises ImportError when they are not installed."""
    from fla.ops.gated_delta_rule import (
        chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule,
    )
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return CudaLibraries(
        chunk_gated_delta_rule=chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule=fused_recurrent_gated_delta_rule,
        paged_attention=BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD"),
    )


@dataclass(slots=True, kw_only=True)
class CudaStep:
    """Index tensors of one step. `planned` says whether FlashInfer has seen them yet."""

    plan: StepPlan
    block_tokens: int
    query_offsets: Tensor  # int32 [S + 1]
    block_offsets: Tensor  # int32 [S + 1]
    blocks: Tensor  # int32
    last_block_tokens: Tensor  # int32 [S]
    conv_taps_NK: Tensor  # for each row, the rows of [all states | inputs] that it reads
    conv_tail_SJ: Tensor  # for each sequence, those that are its new state
    chunk_offsets: Tensor  # int64 [chunks + 1], from the first prefill row
    planned: bool = False


class CudaKernels:
    """Decoded rows and prefill chunks in one call each; one attention call for all."""

    def __init__(self, libraries: CudaLibraries) -> None:
        self._libraries = libraries

    def prepare(self, plan: StepPlan, cache: SequenceCache) -> CudaStep:
        """Upload what the step's calls index with."""
        device = plan.token_ids_R.device
        lengths = [len(s.token_ids) for s in plan.segments]
        totals = [s.start + len(s.token_ids) for s in plan.segments]
        num_blocks = [-(-total // cache.block_tokens) for total in totals]
        blocks = [
            b for s, n in zip(plan.segments, num_blocks, strict=True) for b in s.kv_blocks[:n]
        ]
        last = [(total - 1) % cache.block_tokens + 1 for total in totals]
        begins = [c.start - plan.num_decode for c in plan.chunks]
        taps, tail = _conv_rows(lengths, cache.conv_window)

        def tensor(values: Sequence[object], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return CudaStep(
            plan=plan,
            block_tokens=cache.block_tokens,
            query_offsets=tensor([0, *accumulate(lengths)]),
            block_offsets=tensor([0, *accumulate(num_blocks)]),
            blocks=tensor(blocks),
            last_block_tokens=tensor(last),
            conv_taps_NK=tensor(taps),
            conv_tail_SJ=tensor(tail),
            chunk_offsets=tensor([*begins, plan.num_rows - plan.num_decode], torch.int64),
        )

    def causal_conv(
        self, x_NC: Tensor, weight_KC: Tensor, states: StagedStates, step: CudaStep
    ) -> Tensor:
        """Return silu of the causal depthwise convolution, [N, C]; writes the new last inputs."""
        history = torch.cat([states.before.conv.flatten(0, 1), x_NC])
        states.after.conv.copy_(history[step.conv_tail_SJ])
        return functional.silu((history[step.conv_taps_NK] * weight_KC).sum(1))

    def delta_rule(self, inputs: DeltaInputs, states: StagedStates, step: CudaStep) -> Tensor:
        """Return the outputs of the gated delta rule, [N, VH, DV]; writes the new matrices."""
        before, after = states.before.matrix, states.after.matrix
        num_decode, num_rows = step.plan.num_decode, step.plan.num_rows
        decoded, chunks = slice(0, num_decode), slice(num_decode, num_rows)
        parts = []
        if num_decode:
            o, final = self._recurrent(inputs.rows(decoded), before[:num_decode])
            after[:num_decode] = final
            parts.append(o)
        if num_decode < num_rows:
            offsets = step.chunk_offsets
            o, final = self._chunked(inputs.rows(chunks), before[num_decode:], offsets)
            after[num_decode:] = final
            parts.append(o)
        return torch.cat(parts)

    def _recurrent(self, inputs: DeltaInputs, states: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded rows: a batch of sequences of one token; key heads are repeated by the kernel."""
        q, k = inputs.qk.to(inputs.v.dtype)[:, None].unbind(2)
        o, final = self._libraries.fused_recurrent_gated_delta_rule(
            q=q,
            k=k,
            v=inputs.v[:, None],
            g=inputs.log_decay[:, None],
            beta=inputs.beta[:, None],
            scale=1.0,
            initial_state=states,
            output_final_state=True,
        )
        return o[:, 0], final

    def _chunked(
        self, inputs: DeltaInputs, states: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prefill chunks: one packed batch; key heads are repeated here."""
        repeat = inputs.v.shape[1] // inputs.qk.shape[2]
        q, k = inputs.qk.to(inputs.v.dtype).repeat_interleave(repeat, 2)[None].unbind(2)
        o, final = self._libraries.chunk_gated_delta_rule(
            q=q,
            k=k,
            v=inputs.v[None],
            g=inputs.log_decay[None],
            beta=inputs.beta[None],
            scale=1.0,
            initial_state=states,
            output_final_state=True,
            cu_seqlens=offsets,
        )
        return o[0], final

    def attention(self, q_NHE: Tensor, kv: Tensor, step: CudaStep) -> Tensor:
        """Attend causally to a layer's paged keys and values; [N, H, E]."""
        wrapper = self._libraries.paged_attention
        if not step.planned:  # once a step: all layers have the same shapes
            wrapper.plan(
                step.query_offsets,
                step.block_offsets,
                step.blocks,
                step.last_block_tokens,
                q_NHE.shape[1],
                kv.shape[3],
                q_NHE.shape[2],
                step.block_tokens,
                causal=True,  # aligned at the last query and key
                q_data_type=q_NHE.dtype,
                kv_data_type=kv.dtype,
            )
            step.planned = True
        output: Tensor = wrapper.run(q_NHE.contiguous(), (kv[:, :, 0], kv[:, :, 1]))
        return output


def _conv_rows(lengths: Sequence[int], window: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return which of [all states | inputs] each row's taps read, and each sequence's tail."""
    taps, tail = [], []
    first = window * len(lengths)  # the states come before the inputs
    for index, length in enumerate(lengths):
        past = range(index * window, (index + 1) * window)
        history = [*past, *range(first, first + length)]
        taps += [history[i : i + window + 1] for i in range(length)]
        tail.append(history[length:])
        first += length
    return taps, tail
