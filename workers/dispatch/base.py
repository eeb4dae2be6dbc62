"""The contract of every dispatcher: rows go out to experts, one summed row each comes back.

Shape legend: T rows, D hidden size, K experts a token.
"""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor


class DispatchHandle(Protocol):
    """What `dispatch` returns and `combine` takes, once."""

    @property
    def num_rows(self) -> int:
        """Rows that were dispatched."""
        ...

    @property
    def given_up(self) -> Collection[int]:
        """Rows, once combined, that end the workers which compute them; if any, no sum counts."""
        ...


class Dispatcher(Protocol):
    """Sends rows to the replicas of their experts and returns the weighted sum over experts.

    Handles of several micro-batches may be open at once; each is combined exactly once, in any
    order, or dropped by a step that failed. Implementations belong to one thread.
    """

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> DispatchHandle:
        """Send each row to the holders of its experts; returns before any reply is in.

        Args:
            layer: Layer index, from 0.
            x_TD: Rows in compute dtype, contiguous; not written until `combine` has returned.
            expert_ids_TK: int64 logical expert ids in [0, num_experts), distinct within a row.
            weights_TK: float32 gate weights; applied where the expert is computed.
        """
        ...

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Wait for the replies of one dispatch and return y_TD, in the compute dtype.

        Each (row, expert) is summed exactly once, in a fixed order whatever the order of arrival.
        """
        ...

    def close(self) -> None:
        """Release what the dispatcher holds; open handles are dropped."""
        ...
