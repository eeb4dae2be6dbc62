"""The four operations that differ between devices, behind one protocol, chosen once.

Shape legend: N rows, B decoded rows, M prefill rows, S sequences, C conv channels, K conv kernel,
J = K - 1, VH value heads, DK / DV key and value size, H query heads, G KV heads, E head size.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from workers.model.cache import SequenceCache
from workers.model.cuda_kernels import CudaKernels, load_libraries
from workers.model.delta_inputs import DeltaInputs
from workers.model.step import StepPlan
from workers.model.torch_kernels import TorchKernels


class Kernels(Protocol):
    """Varlen mixers over one step's rows: decoded rows first, prefill chunks after them.

    States are those of the step's sequences, in its order, and are changed in place: `state_SJC`
    holds the last J inputs of the convolution, `state` the matrices [S, VH, DK, DV] in float32.
    """

    def prepare(self, plan: StepPlan, cache: SequenceCache) -> Any:  # noqa: ANN401
        """Return what the other methods take as `step`: the kernels' own affair, once a step."""
        ...

    def causal_conv(
        self,
        x_NC: Tensor,
        weight_KC: Tensor,
        state_SJC: Tensor,
        step: Any,  # noqa: ANN401
    ) -> Tensor:
        """Return silu of the causal depthwise convolution, [N, C]."""
        ...

    def recurrent_delta_rule(self, inputs: DeltaInputs, state: Tensor, step: Any) -> Tensor:  # noqa: ANN401
        """Advance the decoded rows' states by one token each; returns [B, VH, DV].

        S <- S exp(log_decay); S <- S + k (beta (v - S' k))'; o = S' q.
        """
        ...

    def chunk_delta_rule(self, inputs: DeltaInputs, state: Tensor, step: Any) -> Tensor:  # noqa: ANN401
        """The same for the prefill chunks, each from its sequence's state; returns [M, VH, DV]."""
        ...

    def attention(self, q_NHE: Tensor, kv: Tensor, step: Any) -> Tensor:  # noqa: ANN401
        """Attend causally to a layer's paged keys and values, the step's included; [N, H, E].

        `kv` is [blocks, block_tokens, 2, G, E].
        """
        ...


def choose_kernels(device: torch.device) -> Kernels:
    """Return the kernels of a device.

    Raises ImportError when the device needs libraries that are not installed (`expertmesh[cuda]`).
    """
    return TorchKernels() if device.type == "cpu" else CudaKernels(load_libraries(device))
