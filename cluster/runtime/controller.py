"""The controller as a named Ray actor: started, found, called and ended."""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import (
    get_placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.runtime.names import CONTROLLER_NAME, METHODS_AT_ONCE, NAMESPACE, PREFIX, PRIORITY
from cluster.runtime.nodes import node_name
from workers.clock import Clock, SystemClock
from workers.errors import ExpertmeshError, RefusedError, UnavailableError

_LEAST_WAIT_S = 0.1
_ASK_AGAIN_S = 0.2
_ENDING_S = 3.0  # for which an actor that was killed may still be listed


class ControllerHandle:
    """A blocking view of the controller's actor, for the command line and the front doors."""

    def __init__(self, actor: Any, clock: Clock | None = None) -> None:  # noqa: ANN401
        self._actor = actor
        self._clock = clock or SystemClock()

    def call(self, method: str, *arguments: object, timeout_s: float = 30.0) -> Any:  # noqa: ANN401
        """Call the controller and wait; while Ray restarts it, ask again.

        Raises:
            UnavailableError: The controller has ended, or did not answer in time.
            ExpertmeshError: What the controller raised.
        """
        deadline_s = self._clock.now_s() + timeout_s
        while True:
            left_s = max(deadline_s - self._clock.now_s(), _LEAST_WAIT_S)
            try:
                return ray.get(getattr(self._actor, method).remote(*arguments), timeout=left_s)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ExpertmeshError):
                    raise error.cause from error
                raise ExpertmeshError(f"controller: {method}: {error.cause}") from error
            except ray.exceptions.ActorUnavailableError as error:
                if self._clock.now_s() > deadline_s:
                    raise UnavailableError(f"the controller is away: {error}") from error
                time.sleep(_ASK_AGAIN_S)
            except ray.exceptions.RayActorError as error:
                raise UnavailableError(f"the controller has ended: {error}") from error
            except ray.exceptions.GetTimeoutError as error:
                raise UnavailableError(
                    f"the controller did not answer {method} in {timeout_s:g} s"
                ) from error

    def end(self) -> None:
        """End the controller's process; what it started goes on."""
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.kill(self._actor, no_restart=True)


def find_controller(name: str) -> ControllerHandle:
    """Return a handle to the controller that runs under this name.

    Raises UnavailableError when there is none.
    """
    try:
        return ControllerHandle(ray.get_actor(name, NAMESPACE))
    except ValueError as error:
        raise UnavailableError(f"no controller {name} runs: {error}") from error


def start_controller(
    body: type, *arguments: object, name: str, resources: Mapping[str, float] | None = None
) -> ControllerHandle:
    """Start the controller as a named actor, and return a handle.

    It runs where these resources are; without any, on this node if it can be. Raises RefusedError
    when a controller of this name runs already.
    """
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_concurrency": METHODS_AT_ONCE,
        "max_restarts": -1,
        "runtime_env": {"env_vars": dict(PRIORITY)},
    }
    if resources:
        options["resources"] = dict(resources)
    else:
        options["memory"] = 1  # of an actor that asks for nothing Ray draws the node at random
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_name(), soft=True)
    try:
        actor: Any = ray.remote(body).options(**options).remote(*arguments)
    except ValueError as error:
        raise RefusedError(
            f"a controller named {name} runs on this Ray cluster already: {error}"
        ) from error
    return ControllerHandle(actor)


def was_restarted() -> bool:
    """Whether this actor's process took the place of one that died."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def running_processes(clock: Clock | None = None) -> list[str]:
    """Return the names of what runs of a cluster here, but for the controller.

    What is just being ended is waited for. Raises UnavailableError when Ray does not say.
    """
    clock = clock or SystemClock()
    deadline_s = clock.now_s() + _ENDING_S
    while (found := _member_names()) and clock.now_s() < deadline_s:
        time.sleep(_ASK_AGAIN_S)
    return found


def _member_names() -> list[str]:
    try:
        names = [name for name in ray.util.list_named_actors() if name.startswith(PREFIX)]
    except (ray.exceptions.RaySystemError, ray.exceptions.RpcError) as error:
        raise UnavailableError(f"Ray does not say what runs: {error}") from error
    return [name.removeprefix(PREFIX) for name in names if name != CONTROLLER_NAME]


def end_processes() -> int:
    """End every process of the cluster, the controller's first; returns how many there were."""
    names = [name for name in ray.util.list_named_actors() if name.startswith(PREFIX)]
    for name in sorted(names, key=lambda name: name != CONTROLLER_NAME):
        with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
    for entry in placement_group_table().values():
        if entry["name"].startswith(PREFIX) and entry["state"] != "REMOVED":
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(entry["name"]))
    return len(names)
