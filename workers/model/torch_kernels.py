"""The kernels in plain torch: the reference, and what a CPU runs.

At decode sizes every operation costs about as much as its call, so all decoded rows share each
call; prefill chunks go one by one. Shape legend: see kernels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.step import CHUNK_TOKENS, StepPlan


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


class TorchKernels:
    """Batched decode, chunked prefill."""

    def prepare(self, plan: StepPlan, block_tokens: int) -> list[AttentionCall]:
        """Gather block ids and masks of the step's attention calls."""
        device = plan.token_ids_R.device
        return [
            _decode_call(plan, rows, block_tokens, device)
            for group in plan.decode_groups
            for rows in _similar_lengths(plan, group)
        ] + [_chunk_call(plan, i, block_tokens, device) for i in range(len(plan.chunks))]

    def causal_conv(
        self, x_NC: Tensor, weight_KC: Tensor, state_SJC: Tensor, plan: StepPlan
    ) -> Tensor:
        """Return silu of the causal depthwise convolution, [N, C]."""
        parts = []
        for rows in plan.decode_groups:
            window_BKC = torch.cat([state_SJC[rows], x_NC[rows, None]], 1)
            state_SJC[rows] = window_BKC[:, 1:]
            parts.append(F.silu((window_BKC * weight_KC).sum(1)))
        for chunk in plan.chunks:
            rows_MC = torch.cat([state_SJC[chunk.segment], x_NC[chunk.rows]])
            num_rows, kernel = chunk.stop - chunk.start, weight_KC.shape[0]
            y_MC = rows_MC[:num_rows] * weight_KC[0]
            for tap in range(1, kernel):
                y_MC.addcmul_(rows_MC[tap : tap + num_rows], weight_KC[tap])
            state_SJC[chunk.segment] = rows_MC[num_rows:]
            parts.append(F.silu(y_MC))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def recurrent_delta_rule(
        self,
        qk_B2HD: Tensor,
        v_BHD: Tensor,
        log_decay_BH: Tensor,
        beta_BH: Tensor,
        state_BHDD: Tensor,
        plan: StepPlan,
    ) -> Tensor:
        """Advance the decoded rows' states by one token; returns [B, VH, DV]."""
        parts = [
            _recurrent(qk_B2HD[g], v_BHD[g], log_decay_BH[g], beta_BH[g], state_BHDD[g])
            for g in plan.decode_groups
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def chunk_delta_rule(
        self,
        qk_M2HD: Tensor,
        v_MHD: Tensor,
        log_decay_MH: Tensor,
        beta_MH: Tensor,
        state_SHDD: Tensor,
        plan: StepPlan,
    ) -> Tensor:
        """Run the prefill chunks, each from its sequence's state; returns [M, VH, DV]."""
        parts = []
        for chunk in plan.chunks:
            rows = slice(chunk.start - plan.num_decode, chunk.stop - plan.num_decode)
            parts.append(
                _chunked(
                    qk_M2HD[rows],
                    v_MHD[rows],
                    log_decay_MH[rows],
                    beta_MH[rows],
                    state_SHDD[chunk.segment],
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attention(
        self, q_NHE: Tensor, kv: Tensor, plan: StepPlan, prepared: list[AttentionCall]
    ) -> Tensor:
        """Attend causally to a layer's paged keys and values; [N, H, E]."""
        parts = [_attend(q_NHE[call.rows], kv, call) for call in prepared]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _recurrent(
    qk_B2HD: Tensor, v_BHD: Tensor, log_decay_BH: Tensor, beta_BH: Tensor, state_BHDD: Tensor
) -> Tensor:
    """One token of S <- S exp(g); S += k (beta (v - S k))'; o = S q, for all rows and heads."""
    num_rows, heads, size = v_BHD.shape
    repeat = heads // qk_B2HD.shape[2]
    if repeat > 1:
        qk_B2HD = qk_B2HD.repeat_interleave(repeat, 2)
    q, k = qk_B2HD.unbind(1)
    state_BHDD.mul_(log_decay_BH.exp()[:, :, None, None])
    state = state_BHDD.view(num_rows * heads, -1, size)
    k = k.reshape(num_rows * heads, 1, -1)
    known = torch.bmm(k, state).view(num_rows, heads, size)
    fresh = (v_BHD - known).mul_(beta_BH[:, :, None])
    state.baddbmm_(k.mT, fresh.view(num_rows * heads, 1, size))
    return torch.bmm(q.reshape(num_rows * heads, 1, -1), state).view(num_rows, heads, size)


def _chunked(
    qk_M2HD: Tensor, v_MHD: Tensor, log_decay_MH: Tensor, beta_MH: Tensor, state_HDD: Tensor
) -> Tensor:
    """The delta rule over consecutive tokens, in chunks, with matrix products only.

    Within a chunk the updates u solve (I + A) u = beta (v - decayed S k), A strictly lower
    triangular; the inverse of (I + A) is the product of (I + A^(2^i)) with alternating sign.

    Source: Yang et al., "Gated Delta Networks" (WY form, section 3.3); the inverse as in the demo
    model's training script.
    """
    num_rows, heads, size = v_MHD.shape
    padding = -num_rows % CHUNK_TOKENS
    repeat = heads // qk_M2HD.shape[2]

    def chunked(x: Tensor) -> Tensor:  # [M, heads, ...] -> [heads, chunks, CHUNK_TOKENS, ...]
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, padding))
        return x.transpose(0, 1).unflatten(1, (-1, CHUNK_TOKENS))

    q, k = (chunked(x) for x in qk_M2HD.unbind(1))
    products = (torch.stack([k, q]) @ k.mT).repeat_interleave(repeat, 1)
    q, k = q.repeat_interleave(repeat, 0), k.repeat_interleave(repeat, 0)
    beta = chunked(beta_MH)[..., None]
    decay = chunked(log_decay_MH).cumsum(-1)
    ratio = (decay[..., :, None] - decay[..., None, :]).tril_().exp_().tril_()
    inverse = _inverse_unit_lower((products[0] * ratio).mul_(beta).tril_(-1))
    into = decay.exp()[..., None]
    solved = inverse @ torch.cat([chunked(v_MHD), k * into], -1).mul_(beta)
    update, carry = solved.split([size, k.shape[-1]], -1)
    inside = products[1] * ratio
    q = q * into
    k_out = (k * (decay[..., -1:] - decay).exp()[..., None]).mT
    whole = into[:, :, -1:]
    outputs = []
    for i in range(update.shape[1]):
        fresh = torch.baddbmm(update[:, i], carry[:, i], state_HDD, alpha=-1)
        outputs.append(torch.baddbmm(torch.bmm(q[:, i], state_HDD), inside[:, i], fresh))
        state_HDD.mul_(whole[:, i]).baddbmm_(k_out[:, i], fresh)
    return torch.cat(outputs, 1)[:, :num_rows].transpose(0, 1)


def _inverse_unit_lower(strict: Tensor) -> Tensor:
    """Return the inverse of I + strict, for strictly lower triangular matrices [..., n, n]."""
    size = strict.shape[-1]
    inverse = torch.eye(size, device=strict.device) - strict
    power = strict @ strict
    reach = 2
    while reach < size:
        inverse = inverse + inverse @ power
        power = power @ power
        reach *= 2
    return inverse


def _similar_lengths(plan: StepPlan, group: slice) -> list[slice]:
    """Cut decoded rows, longest first, so that no row is padded to more than twice its length."""
    cuts, longest = [group.start], plan.segments[group.start].start + 1
    for row in range(group.start + 1, group.stop):
        length = plan.segments[row].start + 1
        if 2 * length < longest:
            cuts.append(row)
            longest = length
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], group.stop], strict=True)]


def _decode_call(
    plan: StepPlan, rows: slice, block_tokens: int, device: torch.device
) -> AttentionCall:
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


def _chunk_call(
    plan: StepPlan, index: int, block_tokens: int, device: torch.device
) -> AttentionCall:
    chunk = plan.chunks[index]
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
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.reshape(num_rows, heads, size)
    q = q_NHE.unflatten(1, (groups, -1)).permute(2, 1, 0, 3)
    y = F.scaled_dot_product_attention(
        q,
        k.expand(q.shape[0], -1, -1, -1),
        v.expand(q.shape[0], -1, -1, -1),
        attn_mask=call.mask,
        is_causal=call.is_causal,
    )
    return y.permute(2, 1, 0, 3).reshape(num_rows, heads, size)
