"""The nodes of the Ray cluster."""

import ray
from ray._private.state import state as global_state

POOL_LABEL = "expertmesh/pool"


def node_address() -> str:
    """Return the address of this process's node, as the other nodes reach it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def node_name() -> str:
    """Return the id of this process's node."""
    return str(ray.get_runtime_context().get_node_id())


def node_pool() -> str:
    """Return the pool of this process's node, by its label `expertmesh/pool`; empty without one."""
    labels = ray.get_runtime_context().get_node_labels()
    return str(labels.get(POOL_LABEL, ""))


def head_address() -> str:
    """Return HOST:PORT of the head of the Ray cluster that this process has joined."""
    return str(ray.get_runtime_context().gcs_address)


def draining_nodes() -> frozenset[str]:
    """Return the ids of the nodes that Ray is about to take away."""
    return frozenset(global_state.get_draining_nodes())


def node_addresses() -> dict[str, str]:
    """Return the address of every living node, by its id."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}
