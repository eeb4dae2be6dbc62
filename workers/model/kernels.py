"""The four operations that differ between devices, behind one protocol, chosen once.

Shape legend: N rows, B decoded rows, M prefill rows, S sequences, C conv channels, K conv kernel,
VH value heads, KH key heads, DK / DV key and value size, H query heads, G KV heads, E head size.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from workers.model.step import StepPlan
from workers.model.torch_kernels import TorchKernels


class Kernels(Protocol):
    """Varlen mixers over one step's rows: decoded rows first, prefill chunks after them.

    States are those of the step's sequences, in its order, and are changed in place. Queries and
    keys of the delta rule come L2-normalised, and nothing is scaled.
    """

    def prepare(self, plan: StepPlan, block_tokens: int) -> Any:  # noqa: ANN401 - its own affair
        """Return what the kernels need beside the plan, once a step."""
        ...

    def causal_conv(
        self, x_NC: Tensor, weight_KC: Tensor, state_SJC: Tensor, plan: StepPlan
    ) -> Tensor:
        """Return silu of the causal depthwise convolution, [N, C]."""
        ...

    def recurrent_delta_rule(
        self,
        qk_B2HD: Tensor,
        v_BHD: Tensor,
        log_decay_BH: Tensor,
        beta_BH: Tensor,
        state_BHDD: Tensor,
        plan: StepPlan,
    ) -> Tensor:
        """Advance the decoded rows' states by one token; returns [B, VH, DV].

        `qk_B2HD` holds the queries and the keys, [B, 2, KH, DK].
        """
        ...

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
        ...

    def attention(self, q_NHE: Tensor, kv: Tensor, plan: StepPlan, prepared: Any) -> Tensor:  # noqa: ANN401
        """Attend causally to a layer's paged keys and values, the step's included; [N, H, E].

        `kv` is [blocks, block_tokens, 2, G, E].
        """
        ...


def choose_kernels(device: torch.device) -> Kernels:  # noqa: ARG001
    """Return the kernels of a device."""
    return TorchKernels()
