"""What an expert makes of fixed rows: to see that a slot holds it, and that replicas agree."""

import torch
from torch.nn import functional

from workers.model.config import ModelConfig
from workers.model.experts import ExpertShard
from workers.model.parameters import ExpertParameters
from workers.placement import ExpertId

Fingerprint = tuple[float, ...]  # a few outputs, of the largest one

_ROWS = 2
_VALUES = 8


class Probe:
    """Rows drawn from the expert's identity alone, the same on every worker."""

    def __init__(
        self, config: ModelConfig, expert: ExpertId, dtype: torch.dtype, device: torch.device
    ) -> None:
        seed = expert.layer * config.num_experts + expert.expert
        draw = torch.Generator().manual_seed(seed)
        x_RD = torch.randn(_ROWS, config.hidden_size, generator=draw)
        self._x_RD = x_RD.to(device, dtype)
        self.fingerprint: Fingerprint = ()

    def agrees(self, shard: ExpertShard, slot: int, parameters: ExpertParameters) -> bool:
        """Whether a slot computes what the parameters say; takes the fingerprint of its output."""
        gate, up = functional.linear(self._x_RD, parameters.gate_up).chunk(2, -1)
        wanted_RD = functional.linear(functional.silu(gate) * up, parameters.down).float()
        rows_P = torch.arange(_ROWS, device=self._x_RD.device)
        got_RD = shard.forward(self._x_RD, rows_P, [slot], [0, _ROWS]).float()
        largest = max(wanted_RD.abs().max().item(), torch.finfo(torch.float32).tiny)
        self.fingerprint = tuple((got_RD[0, :_VALUES] / largest).tolist())
        tolerance = 8 * torch.finfo(self._x_RD.dtype).eps ** 0.5 * largest
        return bool((got_RD - wanted_RD).abs().max() <= tolerance)
