"""Ray: the only file that imports it.

Ray starts, watches and ends processes and carries slow control messages. It never carries a tensor
or a token.
"""

import contextlib
import importlib
import logging
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.node import Node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.control.ports import (
    Died,
    ProcessId,
    ProcessSpec,
    Raised,
    Returned,
    RuntimeEvent,
)
from workers.errors import ExpertmeshError

NAMESPACE = "expertmesh"
_METHODS_AT_ONCE = 8  # a long call, such as loading, must not hold up a pulse
_GANG_CPU = 0.001  # a placement group's bundle must ask for something


class _Host:
    """The actor around a body, which is imported only in the process that runs it."""

    def __init__(self, body: str, *arguments: object) -> None:
        module, _, name = body.partition(":")
        self._body = getattr(importlib.import_module(module), name)(*arguments)

    def call(self, method: str, *arguments: object) -> object:
        """Call a method of the body."""
        return getattr(self._body, method)(*arguments)


@dataclass(slots=True)
class _Process:
    actor: Any
    alive: bool = True
    gang: str = ""


class RayRuntime:
    """A `Runtime` of Ray actors. Used inside the controller's own actor."""

    def __init__(self) -> None:
        self._processes: dict[ProcessId, _Process] = {}
        self._gangs: dict[str, PlacementGroup] = {}
        self._events: queue.SimpleQueue[RuntimeEvent] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def spawn(self, spec: ProcessSpec) -> None:
        """Start an actor named after the process; its death comes as `Died`."""
        options: dict[str, Any] = {
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "resources": dict(spec.resources),
            "name": f"expertmesh-{spec.id}",
            "namespace": NAMESPACE,
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
        # A call that never returns: its end is the actor's end, noticed within milliseconds.
        self._watch(spec.id, "hold", actor.call.remote("hold"))

    def call(self, process: ProcessId, method: str, *arguments: object) -> None:
        """Call a method of an actor; nothing happens when the actor has died."""
        known = self._processes.get(process)
        if known is not None and known.alive:
            self._watch(process, method, known.actor.call.remote(method, *arguments))

    def poll(self) -> Sequence[RuntimeEvent]:
        """Return what has happened since the last poll."""
        return list(self._drained())

    def kill(self, process: ProcessId) -> None:
        """End an actor's process at once."""
        known = self._processes.get(process)
        if known is not None and known.alive:
            ray.kill(known.actor, no_restart=True)

    def _drained(self) -> Iterator[RuntimeEvent]:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                if isinstance(event, Died):
                    self._bury(event.process)
                yield event

    def _watch(self, process: ProcessId, method: str, reference: Any) -> None:  # noqa: ANN401
        """Turn the outcome of a call into an event, on Ray's callback thread."""

        def on_value(value: object) -> None:
            self._events.put(Returned(process, method, value))

        def on_error(error: BaseException) -> None:
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
    if isinstance(error, ray.exceptions.RayActorError):
        reason = str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
        return Died(process, f"the process ended: {reason}")
    if method == "hold":
        return Died(process, f"the process could not start: {error}")
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return Raised(process, method, f"{type(cause).__name__}: {cause}")


class ControllerHandle:
    """A blocking view of the controller's actor, for the command line."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401
        self._actor = actor

    def call(self, method: str, *arguments: object, timeout_s: float = 30.0) -> Any:  # noqa: ANN401
        """Call the controller and wait.

        Raises:
            ExpertmeshError: The controller has ended, did not answer in time, or raised.
        """
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise ExpertmeshError(f"controller: {method}: {error.cause}") from error
        except ray.exceptions.RayActorError as error:
            raise ExpertmeshError(f"the controller has ended: {error}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise ExpertmeshError(
                f"the controller did not answer {method} in {timeout_s:g} s"
            ) from error

    def end(self) -> None:
        """End the controller's process."""
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.kill(self._actor, no_restart=True)


@contextlib.contextmanager
def ray_session(address: str | None, *, logs_to_console: bool, num_gpus: int) -> Iterator[str]:
    """Join the Ray cluster at `address`, or run one on this machine as long as the context lasts.

    Yields the directory of Ray's session, where every process's log lies. A local cluster offers
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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    context: Any = ray.init(
        address=address or "local",
        namespace=NAMESPACE,
        log_to_driver=logs_to_console,
        logging_level=logging.ERROR,
        configure_logging=True,
        **({} if address else local),
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray puts its own in their place
    try:
        yield str(context.address_info["session_dir"])
    finally:
        ray.shutdown()


def _leave_out_api_server() -> None:
    """Keep Ray from starting its dashboard's process, which nothing here uses.

    Even with the dashboard and reports of use switched off it asks the clouds' metadata addresses
    where it runs (`UsageStatsHead` of ray 2.60.0), and Ray has no setting against it.
    """

    def nothing(_node: Node, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        del include_dashboard, raise_on_failure

    Node.start_api_server = nothing  # type: ignore[assignment]


def start_controller(body: type, *arguments: object, name: str) -> ControllerHandle:
    """Start the controller as a named actor and return a handle to it."""
    actor: Any = (
        ray.remote(body)
        .options(
            name=name,
            namespace=NAMESPACE,
            num_cpus=0,
            max_concurrency=_METHODS_AT_ONCE,
        )
        .remote(*arguments)
    )
    return ControllerHandle(actor)


def node_address() -> str:
    """Return the address of this process's node, as the other nodes reach it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def node_name() -> str:
    """Return the id of this process's node."""
    return str(ray.get_runtime_context().get_node_id())
