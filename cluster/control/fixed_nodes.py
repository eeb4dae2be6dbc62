"""Nodes that are there and stay."""

from collections.abc import Sequence

from cluster.control.ports import NodeNeed


class FixedNodes:
    """An `Actuator` that moves nothing, as on one machine: members find room there, or wait."""

    def provide(self, needs: Sequence[NodeNeed]) -> None:
        """Do nothing."""

    def trouble(self) -> str:
        """Nothing can go wrong."""
        return ""

    def close(self) -> None:
        """Do nothing."""
