"""The four operations that differ between devices, behind one protocol, chosen once.

Shape legend: N rows, S sequences, C conv channels, K conv kernel, VH value heads, DK / DV key and
value size, H query heads, G KV heads, E head size.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from workers.model.cache import SequenceCache, StagedStates
from workers.model.cuda_kernels import CudaKernels, load_libraries
from workers.model.delta_inputs import DeltaInputs
from workers.model.step import StepPlan
from workers.model.torch_kernels import TorchKernels


class Kernels(Protocol):
    """Varlen mixers over one step's rows: decoded rows first, prefill chunks after them.

    `states` are those of the step's sequences in one layer.
    """

    def prepare(self, plan: StepPlan, cache: SequenceCache) -> Any:  # noqa: ANN401
        """Return what the other methods take as `step`: the kernels' own affair, once a step."""
        ...

    def causal_conv(
        self,
        x_NC: Tensor,
        weight_KC: Tensor,
        states: StagedStates,
        step: Any,  # noqa: ANN401
    ) -> Tensor:
        """Return silu of the causal depthwise convolution, [N, C]; writes the new last inputs."""
        ...

    def delta_rule(self, inputs: DeltaInputs, states: StagedStates, step: Any) -> Tensor:  # noqa: ANN401
        """Return the outputs of the gated delta rule, [N, VH, DV]; writes the new matrices.

        Per token: S <- S exp(log_decay); S <- S + k (beta (v - S' k))'; o = S' q, with S [DK, DV]
        in float32. Decoded rows take one such step, prefill chunks the chunked form of it.
        """
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
