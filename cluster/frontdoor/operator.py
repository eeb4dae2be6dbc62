"""What operators may ask of a cluster, as a front door passes it on to the controller."""

from typing import Protocol

from cluster.control.status import ClusterStatus
from workers.errors import UnavailableError
from workers.placement import MemberId, Role


class Operator(Protocol):
    """The controller, from where a front door stands.

    Every method raises UnavailableError while there is no controller.
    """

    async def status(self) -> ClusterStatus:
        """Return the cluster as the controller knows it."""
        ...

    async def scale(self, role: Role, count: int) -> int:
        """Set how many members of a role are wanted; returns how many were before.

        Raises RefusedError, with the reason, when that would break a promise.
        """
        ...

    async def drain(self, name: str) -> MemberId:
        """Have one member leave for good.

        Raises NotFoundError for an unknown name, RefusedError as `scale` does.
        """
        ...


class NoOperator:
    """The operator of a front door that no controller started."""

    async def status(self) -> ClusterStatus:
        """See `Operator`."""
        raise UnavailableError("this front door has no controller")

    async def scale(self, role: Role, count: int) -> int:
        """See `Operator`."""
        raise UnavailableError(f"this front door has no controller to scale {role.value} {count}")

    async def drain(self, name: str) -> MemberId:
        """See `Operator`."""
        raise UnavailableError(f"this front door has no controller to drain {name}")
