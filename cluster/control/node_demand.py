"""Nodes that members' own processes bring, or that nobody does."""

from collections.abc import Sequence

from cluster.control.ports import NodeNeed


class NodeDemand:
    """An `Actuator` that says nothing, since processes do.

    One that waits for a node is what Ray's autoscaler brings a node for, and one that has ended
    leaves its node idle, which Ray takes away. On one machine, and where nodes are fixed, processes
    find room or wait. See docs/decisions/0007.
    """

    def provide(self, needs: Sequence[NodeNeed]) -> None:
        """Do nothing."""

    def trouble(self) -> str:
        """Nothing can go wrong here; who waits for a node is named among those that start."""
        return ""

    def close(self) -> None:
        """Do nothing."""


class NoNodes(NodeDemand):
    """An `Actuator` in place of one that could not be made: nothing moves, and it says why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def trouble(self) -> str:
        """Say why."""
        return self._why
