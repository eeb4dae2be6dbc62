"""What the cluster's actors are called on a Ray cluster."""

from cluster.control.ports import ProcessId

NAMESPACE = "expertmesh"
CONTROLLER_NAME = "expertmesh-controller"
PREFIX = "expertmesh-"
METHODS_AT_ONCE = 8  # a long call, such as loading, must not hold up a pulse


def actor_name(process: ProcessId) -> str:
    """Return the name of a process's actor."""
    return f"{PREFIX}{process}"


def gang_name(gang: str) -> str:
    """Return the name of the placement group of a gang."""
    return f"{PREFIX}{gang}"
