"""What the cluster's actors are called on a Ray cluster, and what all of them have."""

from collections.abc import Mapping
from types import MappingProxyType

from cluster.control.ports import ProcessId

NAMESPACE = "expertmesh"
CONTROLLER_NAME = "expertmesh-controller"
PREFIX = "expertmesh-"
METHODS_AT_ONCE = 8  # a long call, such as loading, must not hold up a pulse
# Ray raises a process to 15 once it is up: at that, whatever starts comes before those that serve.
PRIORITY: Mapping[str, str] = MappingProxyType({"RAY_worker_niceness": "0"})


def actor_name(process: ProcessId) -> str:
    """Return the name of a process's actor."""
    return f"{PREFIX}{process}"


def gang_name(gang: str) -> str:
    """Return the name of the placement group of a gang."""
    return f"{PREFIX}{gang}"
