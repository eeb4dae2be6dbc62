"""Routed experts in numbered slots.

Shape legend: R rows, D hidden, I expert width, P (row, expert) pairs, G groups of pairs.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.layers import tiled_mm
from workers.model.parameters import ExpertParameters


class ExpertShard:
    """The weights of some experts, each in one slot, and their SwiGLU.

    Weights are kept as [in, out], which makes products of few rows faster on a CPU. With
    `row_tile`, groups are computed in zero-padded tiles of that many rows, so that a row's result
    does not depend on its company (bit-stable mode).
    """

    def __init__(
        self,
        num_slots: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        row_tile: int | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.row_tile = row_tile
        gate_up = (num_slots, hidden_size, 2 * intermediate_size)
        down = (num_slots, intermediate_size, hidden_size)
        self._all_gate_up = torch.zeros(gate_up, dtype=dtype, device=device)
        self._all_down = torch.zeros(down, dtype=dtype, device=device)
        self._gate_up: list[Tensor] = list(self._all_gate_up)
        self._down: list[Tensor] = list(self._all_down)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(w[0].numel() * w[0].element_size() for w in (self._gate_up, self._down))

    def write(self, slot: int, parameters: ExpertParameters) -> None:
        """Put an expert into a slot; nobody may be reading it."""
        self._gate_up[slot].copy_(parameters.gate_up.t())
        self._down[slot].copy_(parameters.down.t())

    def forward(
        self, x_RD: Tensor, rows_P: Tensor, slots: Sequence[int], offsets: Sequence[int]
    ) -> Tensor:
        """Compute every pair, unweighted.

        Args:
            x_RD: Rows in the weights' dtype.
            rows_P: int64 row of each pair, sorted by group.
            slots: Slot of each group.
            offsets: Group g has the pairs offsets[g]:offsets[g + 1]; one more than there are slots.

        Returns:
            y_PD, in the order of the pairs.
        """
        sizes = [end - start for start, end in pairwise(offsets)]
        if not slots:
            return x_RD.new_zeros(0, x_RD.shape[1])
        x_PD = x_RD.index_select(0, rows_P)
        if x_PD.is_cuda and self.row_tile is None and _adjacent(slots):
            return self.forward_grouped(x_PD, slots, sizes)
        groups = x_PD.split_with_sizes(sizes)
        if self.row_tile is not None:
            return torch.cat([self._tiled(g, s) for g, s in zip(groups, slots, strict=True)])
        gate_up = torch.cat(
            [torch.mm(g, self._gate_up[s]) for g, s in zip(groups, slots, strict=True)]
        )
        hidden = swiglu(gate_up).split_with_sizes(sizes)
        return torch.cat([torch.mm(h, self._down[s]) for h, s in zip(hidden, slots, strict=True)])

    def forward_grouped(self, x_PD: Tensor, slots: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Compute ascending groups in two calls, the slots between them as empty groups.

        What a GPU needs, where a call costs more than a product; on a CPU the loop is no slower.
        """
        size_of = dict(zip(slots, sizes, strict=True))
        span = range(slots[0], slots[-1] + 1)
        ends = list(accumulate(size_of.get(slot, 0) for slot in span))
        offsets = torch.tensor(ends, dtype=torch.int32, device=x_PD.device)
        weights = slice(span.start, span.stop)
        gate_up = functional.grouped_mm(x_PD, self._all_gate_up[weights], offs=offsets)
        return functional.grouped_mm(swiglu(gate_up), self._all_down[weights], offs=offsets)

    def forward_row(self, x_1D: Tensor, weights_1K: Tensor, slots: Sequence[int]) -> Tensor:
        """Return [1, D], the weighted sum over a row's experts: `forward` in half the calls."""
        gate_up = torch.cat([torch.mm(x_1D, self._gate_up[slot]) for slot in slots])
        hidden = swiglu(gate_up).mul_(weights_1K.t().to(x_1D.dtype))
        first, *others = zip(torch.chunk(hidden, len(slots)), slots, strict=True)
        y_1D = torch.mm(first[0], self._down[first[1]])
        for hidden_1I, slot in others:
            y_1D.addmm_(hidden_1I, self._down[slot])
        return y_1D

    def _tiled(self, x_PD: Tensor, slot: int) -> Tensor:
        """One group in tiles of a fixed number of rows, from the first product to the last."""
        assert self.row_tile is not None
        num_pairs = x_PD.shape[0]
        padded = functional.pad(x_PD, (0, 0, 0, -num_pairs % self.row_tile))
        hidden = swiglu(tiled_mm(padded, self._gate_up[slot], self.row_tile))
        return tiled_mm(hidden, self._down[slot], self.row_tile)[:num_pairs]


def _adjacent(slots: Sequence[int]) -> bool:
    """Whether slots ascend with few gaps, as where a layer's experts lie side by side."""
    ascending = all(a < b for a, b in pairwise(slots))
    return ascending and slots[-1] - slots[0] < 4 * len(slots)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of [..., gate | up]."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate).mul_(up)
