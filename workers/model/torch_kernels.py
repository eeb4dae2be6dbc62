"""The kernels in plain torch: the reference, and what a CPU runs.

At decode sizes every operation costs about as much as its call, so all decoded rows share each
call; prefill chunks go one by one. Shape legend: see kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.batch import CHUNK_TOKENS
from workers.model.cache import SequenceCache, StagedStates
from workers.model.delta_inputs import DeltaInputs
from workers.model.step import Chunk, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """Rows that attend in one call: decoded rows side by side, or one prefill chunk.

    `blocks` are the KV blocks of each decoded row, padded to the longest, or of the chunk.
    `mask` is additive, None where all of `num_keys` keys count.
    """

    rows: slice
    blocks: Tensor
    num_keys: int
    num_sequences: int
    mask: Tensor | None
    is_causal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchStep:
    """One step and its attention calls, in the order of their rows."""

    plan: StepPlan
    attention: tuple[AttentionCall, ...]


class TorchKernels:
    """Batched decode, chunked prefill."""

    def prepare(self, plan: StepPlan, cache: SequenceCache) -> TorchStep:
        """Gather block ids and masks of the step's attention calls."""
        decoded = [
            _decode_call(plan, rows, cache.block_tokens)
            for group in plan.decode_groups
            for rows in _similar_lengths(plan, group)
        ]
        chunks = [_chunk_call(plan, chunk, cache.block_tokens) for chunk in plan.chunks]
        return TorchStep(plan=plan, attention=tuple(decoded + chunks))

    def causal_conv(
        self, x_NC: Tensor, weight_KC: Tensor, states: StagedStates, step: TorchStep
    ) -> Tensor:
        """Return silu of the causal depthwise convolution, [N, C]; writes the new last inputs."""
        before_SJC, after_SJC = states.before.conv, states.after.conv
        parts = []
        for rows in step.plan.decode_groups:
            window_BKC = torch.cat([before_SJC[rows], x_NC[rows, None]], 1)
            after_SJC[rows] = window_BKC[:, 1:]
            parts.append(functional.silu((window_BKC * weight_KC).sum(1)))
        for chunk in step.plan.chunks:
            history = torch.cat([before_SJC[chunk.segment], x_NC[chunk.rows]])
            after_SJC[chunk.segment] = history[chunk.stop - chunk.start :]
            parts.append(_conv_chunk(history, weight_KC))
        return _join(parts)

    def delta_rule(self, inputs: DeltaInputs, states: StagedStates, step: TorchStep) -> Tensor:
        """Return the outputs of the gated delta rule, [N, VH, DV]; writes the new matrices."""
        before, after = states.before.matrix, states.after.matrix
        parts = [_recurrent(inputs.rows(g), before[g], after[g]) for g in step.plan.decode_groups]
        for chunk in step.plan.chunks:
            state_HDD = after[chunk.segment].copy_(before[chunk.segment])
            parts.append(_chunked(inputs.rows(chunk.rows), state_HDD))
        return _join(parts)

    def attention(self, q_NHE: Tensor, kv: Tensor, step: TorchStep) -> Tensor:
        """Attend causally to a layer's paged keys and values; [N, H, E]."""
        return _join([_attend(q_NHE[call.rows], kv, call) for call in step.attention])


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _conv_chunk(history: Tensor, weight_KC: Tensor) -> Tensor:
    """Convolve one prefill chunk behind its sequence's last inputs."""
    kernel = weight_KC.shape[0]
    num_rows = history.shape[0] - kernel + 1
    y_MC = history[:num_rows] * weight_KC[0]
    for tap in range(1, kernel):
        y_MC.addcmul_(history[tap : tap + num_rows], weight_KC[tap])
    return functional.silu(y_MC)


def _recurrent(inputs: DeltaInputs, before_BHDD: Tensor, after_BHDD: Tensor) -> Tensor:
    """One token of the delta rule for all rows and heads at once; [B, VH, DV]."""
    num_rows, heads, size = inputs.v.shape
    qk = inputs.qk.transpose(0, 1)
    repeat = heads // qk.shape[2]
    if repeat > 1:
        qk = qk[:, :, :, None].expand(-1, -1, -1, repeat, -1)
    q, k = qk.reshape(2, num_rows * heads, 1, -1).unbind()
    torch.mul(before_BHDD, inputs.log_decay.exp()[:, :, None, None], out=after_BHDD)
    state = after_BHDD.view(-1, k.shape[2], size)
    known = torch.bmm(k, state).view(num_rows, heads, size)
    fresh = (inputs.v - known).mul_(inputs.beta[:, :, None])
    state.baddbmm_(k.mT, fresh.view(-1, 1, size))
    return torch.bmm(q, state).view(num_rows, heads, size)


def _chunked(inputs: DeltaInputs, state_HDD: Tensor) -> Tensor:
    """The delta rule over consecutive tokens in chunks of matrix products; [M, VH, DV].

    Within a chunk the updates u solve (I + A) u = beta (v - decayed S' k), A strictly lower
    triangular; the updates then act on the outputs and on the state like values of an attention.

    Source: Yang et al., "Gated Delta Networks", section 3.3 (WY form).
    """
    num_rows, heads, _ = inputs.v.shape
    num_chunks = -(-num_rows // CHUNK_TOKENS)
    repeat = heads // inputs.qk.shape[2]

    def chunks(x: Tensor) -> Tensor:  # [M, heads, ...] -> [heads, chunks, CHUNK_TOKENS, ...]
        x = functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -num_rows % CHUNK_TOKENS))
        return x.view(num_chunks, CHUNK_TOKENS, *x.shape[1:]).movedim(2, 0)

    q, k = (chunks(x) for x in inputs.qk.unbind(1))
    k_products, q_products = ((x @ k.mT).repeat_interleave(repeat, 0) for x in (k, q))
    q, k = q.repeat_interleave(repeat, 0), k.repeat_interleave(repeat, 0)
    beta = chunks(inputs.beta)[..., None]
    decay = chunks(inputs.log_decay).cumsum(-1)  # from the chunk's begin to each token
    # tril before exp: above the diagonal the difference is positive and could overflow.
    ratio = (decay[..., :, None] - decay[..., None, :]).tril_().exp_().tril_()
    grown = decay.exp()[..., None]
    # Not by powers of A, as in some training code: they overflow where keys repeat.
    update, carry = torch.linalg.solve_triangular(
        (k_products * ratio).mul_(beta),
        torch.cat([chunks(inputs.v), k * grown], -1).mul_(beta),
        upper=False,
        unitriangular=True,
    ).split_with_sizes([inputs.v.shape[2], k.shape[3]], -1)
    inside = q_products * ratio
    q = q * grown
    k_out = (k * (decay[..., -1:] - decay).exp()[..., None]).mT
    outputs = []
    for i in range(num_chunks):
        fresh = torch.baddbmm(update[:, i], carry[:, i], state_HDD, alpha=-1)
        outputs.append(torch.baddbmm(torch.bmm(q[:, i], state_HDD), inside[:, i], fresh))
        state_HDD.mul_(grown[:, i, -1:]).baddbmm_(k_out[:, i], fresh)
    return torch.cat(outputs, 1)[:, :num_rows].transpose(0, 1)


def _similar_lengths(plan: StepPlan, group: slice) -> list[slice]:
    """Cut decoded rows, longest first, so that no row is padded to more than twice its length."""
    cuts, longest = [group.start], plan.segments[group.start].start + 1
    for row in range(group.start + 1, group.stop):
        length = plan.segments[row].start + 1
        if 2 * length < longest:
            cuts.append(row)
            longest = length
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], group.stop], strict=True)]


def _decode_call(plan: StepPlan, rows: slice, block_tokens: int) -> AttentionCall:
    device = plan.token_ids_R.device
    segments = plan.segments[rows]
    lengths = [s.start + 1 for s in segments]
    num_keys = max(lengths)
    num_blocks = -(-num_keys // block_tokens)
    blocks = [(*s.kv_blocks[:num_blocks], *[0] * (num_blocks - len(s.kv_blocks))) for s in segments]
    mask = None
    if min(lengths) < num_keys:
        beyond = (
            torch.arange(num_keys, device=device) >= torch.tensor(lengths, device=device)[:, None]
        )
        mask = torch.zeros(beyond.shape, device=device).masked_fill_(beyond, float("-inf"))
        mask = mask[:, None, None]
    return AttentionCall(
        rows=rows,
        blocks=torch.tensor(blocks, dtype=torch.int64, device=device).view(-1),
        num_keys=num_keys,
        num_sequences=len(segments),
        mask=mask,
    )


def _chunk_call(plan: StepPlan, chunk: Chunk, block_tokens: int) -> AttentionCall:
    device = plan.token_ids_R.device
    segment = plan.segments[chunk.segment]
    num_keys = segment.start + len(segment.token_ids)
    mask = None
    if segment.start:
        positions = torch.arange(segment.start, num_keys, device=device)
        ahead = torch.arange(num_keys, device=device) > positions[:, None]
        mask = torch.zeros(ahead.shape, device=device).masked_fill_(ahead, float("-inf"))
    blocks = segment.kv_blocks[: -(-num_keys // block_tokens)]
    return AttentionCall(
        rows=chunk.rows,
        blocks=torch.tensor(blocks, dtype=torch.int64, device=device),
        num_keys=num_keys,
        num_sequences=1,
        mask=mask,
        is_causal=mask is None,
    )


def _attend(q_NHE: Tensor, kv: Tensor, call: AttentionCall) -> Tensor:
    """Attend with grouped heads: the queries of a KV head stand side by side, keys are not copied.

    A decoded row takes the group as its query axis, a chunk as its batch axis.
    """
    num_rows, heads, size = q_NHE.shape
    groups = kv.shape[3]
    gathered = kv.index_select(0, call.blocks).view(call.num_sequences, -1, 2, groups, size)
    k, v = gathered[:, : call.num_keys].permute(2, 0, 3, 1, 4)
    if num_rows == call.num_sequences and not call.is_causal:
        q = q_NHE.reshape(num_rows, groups, -1, size)
        mask = call.mask if call.mask is None else call.mask.expand(-1, 1, q.shape[2], -1)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.reshape(num_rows, heads, size)
    q = q_NHE.reshape(num_rows, groups, -1, size).permute(2, 1, 0, 3)
    y = functional.scaled_dot_product_attention(
        q,
        k.expand(q.shape[0], -1, -1, -1),
        v.expand(q.shape[0], -1, -1, -1),
        attn_mask=call.mask,
        is_causal=call.is_causal,
    )
    return y.permute(2, 1, 0, 3).reshape(num_rows, heads, size)
