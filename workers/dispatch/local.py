"""Experts in the gateway's own process: the reference for every other dispatcher.

Shape legend: T rows, D hidden, K experts a token, P pairs of row and expert.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.dispatch.base import DispatchHandle
from workers.dispatch.pairs import group_pairs, sum_pairs
from workers.errors import PlacementError
from workers.placement import ExpertId


class Experts(Protocol):
    """What computes experts (workers.model.experts.ExpertShard)."""

    row_tile: int | None

    def forward(
        self, x_RD: Tensor, rows_P: Tensor, slots: Sequence[int], offsets: Sequence[int]
    ) -> Tensor:
        """Return one unweighted row for each pair; pairs are sorted by group."""
        ...

    def forward_row(self, x_1D: Tensor, weights_1K: Tensor, slots: Sequence[int]) -> Tensor:
        """Return the weighted sum over the experts of a single row."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalHandle:
    """A dispatch that is computed already."""

    y_TD: Tensor

    @property
    def num_rows(self) -> int:
        """Rows that were dispatched."""
        return self.y_TD.shape[0]

    @property
    def given_up(self) -> Collection[int]:
        """See `DispatchHandle`: what ends this process does not come so far."""
        return ()


class LocalDispatcher:
    """Runs experts at once, in this thread.

    A row's experts are summed in order of their ids; a single row's in order of their weights,
    unless the shard is bit-stable.
    """

    def __init__(self, shard: Experts, slot_of: Mapping[ExpertId, int]) -> None:
        self._shard = shard
        self._slots: dict[int, dict[int, int]] = {}
        for expert, slot in slot_of.items():
            self._slots.setdefault(expert.layer, {})[expert.expert] = slot
        self._num_experts = 1 + max((expert.expert for expert in slot_of), default=0)

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> LocalHandle:
        """Compute the experts of all rows.

        Raises:
            PlacementError: An expert was chosen that is in no slot.
        """
        num_rows, num_chosen = expert_ids_TK.shape
        if num_rows == 1 and self._shard.row_tile is None:
            slots = self._find(layer, expert_ids_TK[0].tolist())
            return LocalHandle(y_TD=self._shard.forward_row(x_TD, weights_TK, slots))
        order_P, experts, offsets = group_pairs(expert_ids_TK, self._num_experts)
        slots = self._find(layer, experts)
        weights_P = weights_TK.flatten()[order_P]
        rows_P = torch.div(order_P, num_chosen, rounding_mode="floor")
        y_PD = self._shard.forward(x_TD, rows_P, slots, offsets)
        return LocalHandle(y_TD=sum_pairs(y_PD, weights_P, rows_P, num_rows))

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Return y_TD."""
        assert isinstance(handle, LocalHandle)
        return handle.y_TD

    def close(self) -> None:
        """Nothing is held that needs releasing."""

    def _find(self, layer: int, experts: Sequence[int]) -> list[int]:
        slots = self._slots.get(layer, {})
        missing = [expert for expert in experts if expert not in slots]
        if missing:
            raise PlacementError(f"layer {layer}: experts {missing} are in no slot")
        return [slots[expert] for expert in experts]
