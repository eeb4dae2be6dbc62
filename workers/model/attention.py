"""Gated full attention with partial rotary positions over a paged cache.

Shape legend: R padded rows, N rows, D hidden, H / G query and KV heads of this rank, E head size.
"""

from typing import Any

import torch
from torch import Tensor

from workers.model.config import ModelConfig
from workers.model.kernels import Kernels
from workers.model.layers import Linear, RmsNorm
from workers.model.parameters import AttentionParameters
from workers.model.rope import pair_rows, rotate_
from workers.model.step import StepPlan


class GatedAttention:
    """One rank's heads of a full-attention layer."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: AttentionParameters,
        kernels: Kernels,
        *,
        row_tile: int | None = None,
    ) -> None:
        p, size, rotary = parameters, config.head_dim, config.rotary_dim
        self._kernels = kernels
        self._size = size
        q_gate = p.q_gate.view(-1, 2, size, config.hidden_size)
        q, gate = q_gate[:, 0].flatten(0, 1), q_gate[:, 1].flatten(0, 1)
        heads, kv_heads = q.shape[0] // size, p.k.shape[0] // size
        self._qk_heads = [heads, kv_heads]
        self._project = Linear(
            pair_rows(q, heads, rotary),
            pair_rows(p.k, kv_heads, rotary),
            p.v,
            gate,
            row_tile=row_tile,
        )
        self._sizes = [(heads + kv_heads) * size, p.v.shape[0], gate.shape[0]]
        q_norm = pair_rows(p.q_norm[:, None], 1, rotary).t().expand(heads, -1)
        k_norm = pair_rows(p.k_norm[:, None], 1, rotary).t().expand(kv_heads, -1)
        self._norm = RmsNorm(torch.cat([q_norm, k_norm]), config.rms_norm_eps)
        self._out = Linear(p.o, row_tile=row_tile)

    def forward(self, h_RD: Tensor, plan: StepPlan, step: Any, kv: Tensor) -> Tensor:  # noqa: ANN401
        """Return this rank's part of the output [R, D]; writes the rows' keys and values."""
        qk, v, gate = self._project(h_RD).split_with_sizes(self._sizes, -1)
        qk_RHE = self._norm(qk.view(h_RD.shape[0], -1, self._size))
        rotate_(qk_RHE, plan.rotations_R1F)
        q, k = plan.cut(qk_RHE).to(h_RD.dtype).split_with_sizes(self._qk_heads, 1)
        slots = kv.flatten(0, 1)
        slots[:, 0].index_copy_(0, plan.kv_slots_N, k)
        slots[:, 1].index_copy_(0, plan.kv_slots_N, plan.cut(v).view_as(k))
        y = plan.pad(self._kernels.attention(q, kv, step)).flatten(1)
        return self._out(y * gate.sigmoid())
