"""Gated DeltaNet: a linear-attention mixer with a recurrent state instead of keys and values.

Shape legend: R padded rows, N rows, D hidden, C conv channels, VH / KH value and key heads of this
rank, DK / DV their sizes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.cache import StagedStates
from workers.model.config import ModelConfig
from workers.model.delta_inputs import DeltaInputs
from workers.model.kernels import Kernels
from workers.model.layers import Linear, RmsNorm, normalize
from workers.model.parameters import DeltaNetParameters
from workers.model.step import StepPlan

_L2_EPS = 1e-6  # of the norm of queries and keys, fixed by the architecture


class GatedDeltaNet:
    """One rank's heads of a linear layer."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: DeltaNetParameters,
        kernels: Kernels,
        *,
        row_tile: int | None = None,
    ) -> None:
        p = parameters
        self._kernels = kernels
        self._key_size = config.linear_key_head_dim
        self._value_size = config.linear_value_head_dim
        heads = p.a_log.shape[0]
        channels = p.qkv.shape[0]
        values = heads * self._value_size
        self._qk_v_sizes = [channels - values, values]
        self._project = Linear(p.qkv, p.z, p.b, p.a, row_tile=row_tile)
        self._sizes = [channels, values, heads, heads]
        self._out = Linear(p.out, row_tile=row_tile)
        self._conv_KC = p.conv.view(channels, -1).t().contiguous()
        self._dt_bias = p.dt_bias.float()
        self._rate = -p.a_log.float().exp()
        self._l2_floor = torch.tensor(_L2_EPS**0.5, device=p.qkv.device)
        # The queries' scale DK^-0.5 is left out: the output norm cancels it but for its eps.
        self._norm = RmsNorm(p.norm, config.rms_norm_eps * self._key_size, offset=0.0)

    def forward(
        self,
        h_RD: Tensor,
        plan: StepPlan,
        step: Any,  # noqa: ANN401 - what the kernels made of the plan
        states: StagedStates,
    ) -> Tensor:
        """Return this rank's part of the mixer's output [R, D]; writes the states after it."""
        num_rows = h_RD.shape[0]
        x_RC, z, b, a = self._project(h_RD).split_with_sizes(self._sizes, -1)
        beta = b.float().sigmoid()
        log_decay = functional.softplus(a + self._dt_bias).mul_(self._rate)
        y_NC = self._kernels.causal_conv(plan.cut(x_RC), self._conv_KC, states, step)
        qk_RC, v_RC = plan.pad(y_NC).split_with_sizes(self._qk_v_sizes, -1)
        qk = normalize(qk_RC.view(num_rows, 2, -1, self._key_size), self._l2_floor)
        inputs = DeltaInputs(
            qk=plan.cut(qk),
            v=plan.cut(v_RC).view(plan.num_rows, -1, self._value_size),
            log_decay=plan.cut(log_decay),
            beta=plan.cut(beta),
        )
        o = self._norm(plan.pad(self._kernels.delta_rule(inputs, states, step)))
        gated = o.mul_(functional.silu(z.float()).view_as(o))
        return self._out(gated.flatten(1).to(h_RD.dtype))
