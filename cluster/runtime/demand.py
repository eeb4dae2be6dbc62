"""Nodes as Ray's autoscaler brings and takes them."""

import threading
from collections.abc import Mapping, Sequence

import ray
import structlog
from ray.autoscaler.sdk import request_resources

from cluster.control.ports import NodeNeed, ProcessSpec
from workers.placement import Role

_AGAIN_S = 10.0  # what a GCS without durable storage forgets is told to it again

_log = structlog.get_logger("nodes")

Bundle = dict[str, float]


class RayDemand:
    """An `Actuator` that leaves nodes to Ray's autoscaler.

    A member has its node come by waiting for it, and go by leaving it idle: nothing need be said.
    Only `spare` nodes beyond those for the members of some roles are asked for, in one standing
    request, of which a Ray cluster has one.

    Args:
        members: What the processes of one member ask for, for each role that has spare nodes.
        spare: For how many members more there are to be nodes.
    """

    def __init__(self, members: Mapping[Role, Sequence[ProcessSpec]], *, spare: int) -> None:
        self._members = {role: [_bundle(s) for s in specs] for role, specs in members.items()}
        self._spare = spare
        self._wanted: list[Bundle] = []
        self._changed = threading.Event()
        self._closed = False
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)
        self._thread.start()

    def provide(self, needs: Sequence[NodeNeed]) -> None:
        """Ask for the spare nodes, beyond those for the members that are wanted."""
        if not self._spare:
            return
        wanted = [
            bundle
            for need in needs
            for bundle in self._members.get(need.role, ()) * (need.count + self._spare)
        ]
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()

    def trouble(self) -> str:
        """Say whether Ray has not taken the request."""
        return self._trouble

    def close(self) -> None:
        """Ask no more; what was asked for stays until another controller asks, or `end_demand`."""
        self._closed = True
        self._changed.set()

    def _run(self) -> None:
        while not self._closed:
            try:
                request_resources(bundles=self._wanted)
                self._trouble = ""
            except (ray.exceptions.RaySystemError, ray.exceptions.RpcError) as error:
                self._trouble = f"Ray did not take the request for {self._spare} spare nodes"
                _log.warning("request for nodes failed", why=str(error))
            # Without spare nodes it is enough to have withdrawn what an earlier one asked for.
            self._changed.wait(_AGAIN_S if self._spare else None)
            self._changed.clear()


def end_demand() -> None:
    """Withdraw the standing request: nodes that hold nothing may go."""
    request_resources(bundles=[])


def _bundle(spec: ProcessSpec) -> Bundle:
    asked = {"CPU": spec.num_cpus, "GPU": spec.num_gpus, **spec.resources}
    return {name: amount for name, amount in asked.items() if amount}
