"""Ray: the only file that imports it.

Ray starts, watches and ends processes and carries slow control messages. It never carries a tensor
or a token.
"""

import contextlib
import importlib
import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.node import Node
from ray._private.state import state as global_state
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from cluster.control.fence import Fence
from cluster.control.ports import (
    Died,
    Leaving,
    Opened,
    ProcessId,
    ProcessSpec,
    Raised,
    Returned,
    RuntimeEvent,
)
from workers.clock import Clock, SystemClock
from workers.errors import ExpertmeshError, RefusedError, UnavailableError

NAMESPACE = "expertmesh"
CONTROLLER_NAME = "expertmesh-controller"
_METHODS_AT_ONCE = 8  # a long call, such as loading, must not hold up a pulse
_PREFIX = "expertmesh-"
_LOOK_AT_NODES_S = 1.0
_LEAST_WAIT_S = 0.1
_ASK_AGAIN_S = 0.2
_REACH_S = 10.0
_GANG_CPU = 0.001  # a placement group's bundle must ask for something


log = logging.getLogger(__name__)


class _Host:
    """The actor around a body, which is imported only in the process that runs it."""

    def __init__(self, body: str, *arguments: object) -> None:
        module, _, name = body.partition(":")
        self._fence = Fence()
        self._watched = threading.Event()
        self._body = getattr(importlib.import_module(module), name)(*arguments)

    def call(self, term: int, method: str, *arguments: object) -> object:
        """Call a method of the body, for a controller that has not been superseded."""
        self._fence.admit(term)
        return getattr(self._body, method)(*arguments)

    def hold(self) -> None:
        """Return when the process ends, by which the caller learns of its death.

        A later caller takes the place of the earlier one, whose thread here comes free.
        """
        before, self._watched = self._watched, threading.Event()
        mine = self._watched
        before.set()
        mine.wait()


@dataclass(slots=True)
class _Process:
    actor: Any
    alive: bool = True
    gang: str = ""


class RayRuntime:
    """A `Runtime` of Ray actors, which outlive whoever uses it. For the controller's own actor."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._processes: dict[ProcessId, _Process] = {}
        self._gangs: dict[str, PlacementGroup] = {}
        self._events: queue.SimpleQueue[RuntimeEvent] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._nodes: dict[ProcessId, str] = {}
        self._draining: set[ProcessId] = set()
        self._looked_s = clock.now_s()
        self._looking = threading.Lock()

    def spawn(self, spec: ProcessSpec) -> None:
        """Start an actor named after the process; its death comes as `Died`."""
        options: dict[str, Any] = {
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "resources": dict(spec.resources),
            "name": _actor_name(spec.id),
            "namespace": NAMESPACE,
            "lifetime": "detached",  # a controller may die; what it started goes on
            "max_concurrency": _METHODS_AT_ONCE,
            "max_restarts": 0,
            "runtime_env": {"env_vars": dict(spec.environment)} if spec.environment else None,
        }
        if spec.gang is not None:
            name, size = spec.gang
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._gang(name, size, spec), placement_group_bundle_index=spec.id.rank
            )
            options["num_cpus"] = max(spec.num_cpus, _GANG_CPU)
        actor: Any = ray.remote(_Host).options(**options).remote(spec.body, *spec.arguments)
        process = _Process(actor, gang=spec.gang[0] if spec.gang else "")
        self._processes[spec.id] = process
        self._hold(spec.id)

    def adopt(self, process: ProcessId) -> None:
        """Find the actor of a process by its name and watch it."""
        try:
            actor: Any = ray.get_actor(_actor_name(process), NAMESPACE)
        except ValueError:
            self._events.put(Died(process, "the process is not there any more"))
            return
        self._processes[process] = _Process(actor)
        self._hold(process)

    def call(self, process: ProcessId, term: int, method: str, *arguments: object) -> None:
        """Call a method of an actor; nothing happens when the actor has died."""
        known = self._processes.get(process)
        if known is not None and known.alive:
            self._watch(process, method, known.actor.call.remote(term, method, *arguments))

    def poll(self) -> Sequence[RuntimeEvent]:
        """Return what has happened since the last poll."""
        self._look_at_nodes()
        return list(self._heard())

    def kill(self, process: ProcessId) -> None:
        """End an actor's process at once."""
        known = self._processes.get(process)
        if known is not None and known.alive:
            ray.kill(known.actor, no_restart=True)

    def _look_at_nodes(self) -> None:
        """Begin to ask Ray which nodes it is about to take away; a GCS that is away takes long."""
        if self._clock.now_s() - self._looked_s < _LOOK_AT_NODES_S or self._looking.locked():
            return
        self._looked_s = self._clock.now_s()
        threading.Thread(target=self._find_leaving, name="nodes", daemon=True).start()

    def _find_leaving(self) -> None:
        """Report, once each, the processes on nodes that are about to go."""
        with self._looking:
            try:
                draining = draining_nodes()
            except (ray.exceptions.RaySystemError, ray.exceptions.RpcError) as error:
                log.warning("Ray does not say which nodes drain: %s", error)
                return
            for process, node in list(self._nodes.items()):
                if node in draining and process not in self._draining:
                    self._draining.add(process)
                    self._events.put(Leaving(process, f"node {node} is draining"))

    def _heard(self) -> Iterator[RuntimeEvent]:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                if isinstance(event, Died):
                    self._bury(event.process)
                if isinstance(event, Returned) and isinstance(event.value, Opened):
                    self._nodes[event.process] = event.value.node
                yield event

    def _hold(self, process: ProcessId) -> None:
        """Make a call that never returns: its end is the actor's end, noticed in milliseconds."""
        known = self._processes.get(process)
        if known is not None:
            self._watch(process, "hold", known.actor.hold.remote())

    def _watch(self, process: ProcessId, method: str, reference: Any) -> None:  # noqa: ANN401
        """Turn the outcome of a call into an event, on Ray's callback thread."""

        def on_value(value: object) -> None:
            self._events.put(Returned(process, method, value))

        def on_error(error: BaseException) -> None:
            if method == "hold" and isinstance(error, ray.exceptions.ActorUnavailableError):
                # Not reached, which is not dead: silence is what counts until it is heard again.
                threading.Timer(_ASK_AGAIN_S, self._hold, [process]).start()
            else:
                self._events.put(_event_of(process, method, error))

        future = reference.future()

        def done(finished: Any) -> None:  # noqa: ANN401
            error = finished.exception()
            if error is None:
                on_value(finished.result())
            else:
                on_error(error)

        future.add_done_callback(done)

    def _bury(self, process: ProcessId) -> None:
        self._nodes.pop(process, None)
        self._draining.discard(process)
        with self._lock:
            known = self._processes.pop(process, None)
            if known is None or not known.gang:
                return
            if not any(other.gang == known.gang for other in self._processes.values()):
                remove_placement_group(self._gangs.pop(known.gang))

    def _gang(self, name: str, size: int, spec: ProcessSpec) -> PlacementGroup:
        """Return the placement group of a gang: one bundle a process, packed on few nodes."""
        if name not in self._gangs:
            bundle = {"CPU": max(spec.num_cpus, _GANG_CPU), **spec.resources}
            if spec.num_gpus:
                bundle["GPU"] = spec.num_gpus
            self._gangs[name] = placement_group([bundle] * size, strategy="PACK")
        return self._gangs[name]


def _event_of(process: ProcessId, method: str, error: BaseException) -> RuntimeEvent:
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return Raised(process, method, "the process is not reached")
    if isinstance(error, ray.exceptions.RayActorError):
        reason = str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
        return Died(process, f"the process ended: {reason}")
    if method == "hold":
        return Died(process, f"the process could not start: {error}")
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return Raised(process, method, f"{type(cause).__name__}: {cause}")


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


def end_processes() -> int:
    """End every process of the cluster, the controller's first; returns how many there were."""
    names = [name for name in ray.util.list_named_actors() if name.startswith(_PREFIX)]
    for name in sorted(names, key=lambda name: name != CONTROLLER_NAME):
        with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
    return len(names)


def find_controller(name: str) -> ControllerHandle:
    """Return a handle to the controller that runs under this name.

    Raises UnavailableError when there is none.
    """
    try:
        return ControllerHandle(ray.get_actor(name, NAMESPACE))
    except ValueError as error:
        raise UnavailableError(f"no controller {name} runs: {error}") from error


def draining_nodes() -> frozenset[str]:
    """Return the ids of the nodes that Ray is about to take away."""
    return frozenset(global_state.get_draining_nodes())


def was_restarted() -> bool:
    """Whether this actor's process took the place of one that died."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _actor_name(process: ProcessId) -> str:
    return f"{_PREFIX}{process}"


@contextlib.contextmanager
def ray_session(address: str | None, *, logs_to_console: bool, num_gpus: int) -> Iterator[str]:
    """Join the Ray cluster at `address`, or run one on this machine as long as the context lasts.

    Yields the directory of Ray's session, where every process's log lies; "" where it is not known,
    since the address is that of a Ray client server (ray://HOST:PORT). A local cluster offers
    the custom resources that pools name in a real one, and starts no process before its time.
    """
    local: dict[str, Any] = {
        "num_cpus": 2,
        "num_gpus": num_gpus,
        "include_dashboard": False,
        "object_store_memory": 80 * 2**20,  # about the least; nothing large goes through it
        "resources": {"gateway": 1000, "expert_slot": 1_000_000, "frontdoor": 1000},
        "_system_config": {"enable_worker_prestart": False},
    }
    if not address:
        _leave_out_api_server()
    if address:
        _reach(address)
    client = address is not None and address.startswith("ray://")
    quiet: dict[str, Any] = {
        "log_to_driver": logs_to_console,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    options = {**({} if client else quiet), **({} if address else local)}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    context = _joined(address or "local", options)
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray puts its own in their place
    try:
        yield "" if client else str(context.address_info["session_dir"])
    finally:
        ray.shutdown()


def _joined(address: str, options: dict[str, Any]) -> Any:  # noqa: ANN401 - Ray's own
    """Join Ray, once more where its node on this machine did not come up in time."""
    for is_last in (False, True):
        try:
            return ray.init(address=address, namespace=NAMESPACE, **options)
        except Exception as error:
            if is_last or "timed out during startup" not in str(error):
                raise
            log.warning("Ray's node did not come up; trying once more: %s", error)
            ray.shutdown()
    raise AssertionError


def _reach(address: str) -> None:
    """Raise UnavailableError when nobody listens at HOST:PORT, for which Ray would wait minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # a word that Ray knows, such as auto
    try:
        with socket.create_connection((host, int(port)), _REACH_S):
            pass
    except OSError as error:
        raise UnavailableError(f"no Ray cluster is reached at {address}: {error}") from error


def _leave_out_api_server() -> None:
    """Keep Ray from starting its dashboard's process, which nothing here uses.

    Even with the dashboard and reports of use switched off it asks the clouds' metadata addresses
    where it runs (`UsageStatsHead` of ray 2.60.0), and Ray has no setting against it.
    """

    def nothing(_node: Node, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        del include_dashboard, raise_on_failure

    Node.start_api_server = nothing  # type: ignore[assignment]


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
        "max_concurrency": _METHODS_AT_ONCE,
        "max_restarts": -1,
    }
    if resources:
        options["resources"] = dict(resources)
    else:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_name(), soft=True)
    try:
        actor: Any = ray.remote(body).options(**options).remote(*arguments)
    except ValueError as error:
        raise RefusedError(
            f"a controller named {name} runs on this Ray cluster already: {error}"
        ) from error
    return ControllerHandle(actor)


def node_address() -> str:
    """Return the address of this process's node, as the other nodes reach it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def node_name() -> str:
    """Return the id of this process's node."""
    return str(ray.get_runtime_context().get_node_id())
