"""The gate: which experts a token goes to, and with what weights.

Shape legend: T rows, E experts, K experts a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class GateProbe:
    """Records how close each row came to another choice of experts, for teacher forcing.

    `margins_LN` holds, per layer and row of the last step's batch, the probability of the last
    chosen expert less that of the first one not chosen; infinite for rows of other ranks and where
    all experts are chosen.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self.margins_LN = torch.empty(num_layers, 0)

    def begin(self, num_rows: int) -> None:
        """Forget the last step; the next one has `num_rows` rows."""
        self.margins_LN = torch.full((self._num_layers, num_rows), float("inf"))

    def record(self, layer: int, rows: Sequence[int], logits_TE: Tensor, num_chosen: int) -> None:
        """Record the margins of some rows, given as their places in the batch."""
        if num_chosen < logits_TE.shape[1]:
            best = logits_TE.float().softmax(-1).topk(num_chosen + 1, -1).values
            self.margins_LN[layer, list(rows)] = (best[:, -2] - best[:, -1]).cpu()


class RoutingProbe(GateProbe):
    """Records also which experts each row chose: `ids_LN`, one [num_chosen] list a row, best first.

    Rows of other ranks have none.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.ids_LN: list[dict[int, list[int]]] = [{} for _ in range(num_layers)]

    def begin(self, num_rows: int) -> None:
        """Forget the last step."""
        super().begin(num_rows)
        for ids_N in self.ids_LN:
            ids_N.clear()

    def record(self, layer: int, rows: Sequence[int], logits_TE: Tensor, num_chosen: int) -> None:
        """Record the choices of some rows, given as their places in the batch."""
        super().record(layer, rows, logits_TE, num_chosen)
        chosen = logits_TE.float().topk(num_chosen, -1).indices.tolist()
        self.ids_LN[layer].update(zip(rows, chosen, strict=True))


class TopKGate:
    """Softmax over all experts in float32, the best K, renormalised to sum 1.

    Renormalising cancels the denominator of the softmax, so it is taken over the chosen logits.
    """

    def __init__(self, num_chosen: int) -> None:
        self.num_chosen = num_chosen

    def __call__(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return expert_ids_TK int64 and weights_TK float32, best first."""
        best_TK, expert_ids_TK = torch.topk(logits_TE.float(), self.num_chosen, -1)
        return expert_ids_TK, torch.softmax(best_TK, -1)
