"""Processes as Ray actors: started, watched, called and ended."""

import contextlib
import importlib
import logging
import os
import pickle
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
from cluster.runtime.names import METHODS_AT_ONCE, NAMESPACE, PRIORITY, actor_name, gang_name
from cluster.runtime.nodes import draining_nodes
from workers.clock import Clock
from workers.placement import View

_LOOK_AT_NODES_S = 1.0
_ASK_AGAIN_S = 0.2
_IMPORT_NICENESS = 5  # a quarter of a core that one other thread wants; at 19 it is a hundredth
_MOST_NICENESS = 19
_GANG_CPU = 0.001  # a placement group's bundle must ask for something


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Pickled:
    """An argument that was pickled before."""

    data: bytes

    def value(self) -> object:
        """Return it as it was."""
        return pickle.loads(self.data)  # noqa: S301 - from the controller, as all that Ray brings


class _Host:
    """The actor around a body, which is imported only in the process that runs it."""

    def __init__(self, body: str, *arguments: object) -> None:
        module, _, name = body.partition(":")
        self._fence = Fence()
        self._watched = threading.Event()
        self._body = getattr(_import_meekly(module), name)(*arguments)

    def call(self, term: int, method: str, *arguments: object) -> object:
        """Call a method of the body, for a controller that has not been superseded."""
        self._fence.admit(term)
        plain = (a.value() if isinstance(a, _Pickled) else a for a in arguments)
        return getattr(self._body, method)(*plain)

    def hold(self) -> None:
        """Return when the process ends, by which the caller learns of its death.

        A later caller takes the place of the earlier one, whose thread here comes free.
        """
        before, self._watched = self._watched, threading.Event()
        mine = self._watched
        before.set()
        mine.wait()


def _import_meekly(module: str) -> ModuleType:
    """Import a module with less priority than those that serve: torch takes a core for seconds.

    In a thread of its own, since niceness is a thread's on Linux and only root may lower it again.
    """
    with ThreadPoolExecutor(1, initializer=_yield_to_others) as pool:
        return pool.submit(importlib.import_module, module).result()


def _yield_to_others() -> None:
    if sys.platform == "linux":
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(now + _IMPORT_NICENESS, _MOST_NICENESS))


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
        self._newest: tuple[View, _Pickled] | None = None

    def spawn(self, spec: ProcessSpec) -> None:
        """Start an actor named after the process; its death comes as `Died`."""
        options: dict[str, Any] = {
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "resources": dict(spec.resources),
            "name": actor_name(spec.id),
            "namespace": NAMESPACE,
            "lifetime": "detached",  # a controller may die; what it started goes on
            "max_concurrency": METHODS_AT_ONCE,
            "max_restarts": 0,
            "runtime_env": {"env_vars": {**PRIORITY, **spec.environment}},
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

    def adopt(self, process: ProcessId, node: str) -> None:
        """Find the actor of a process by its name and watch it."""
        gang = str(process.member)
        try:
            actor: Any = ray.get_actor(actor_name(process), NAMESPACE)
        except ValueError:
            self._events.put(Died(process, "the process is not there any more"))
            # Its member ends with it, and with that whatever else is in its placement group.
            threading.Thread(target=_disband, args=(gang,), daemon=True).start()
            return
        if node:
            self._nodes[process] = node
        self._processes[process] = _Process(actor, gang=gang)
        self._hold(process)

    def call(self, process: ProcessId, term: int, method: str, *arguments: object) -> None:
        """Call a method of an actor; nothing happens when the actor has died."""
        known = self._processes.get(process)
        if known is not None and known.alive:
            packed = map(self._pickled, arguments)
            self._watch(process, method, known.actor.call.remote(term, method, *packed))

    def _pickled(self, argument: object) -> object:
        """Pickle a View once for all that get it: at scale it takes long."""
        if not isinstance(argument, View):
            return argument
        if self._newest is None or self._newest[0] is not argument:
            self._newest = argument, _Pickled(pickle.dumps(argument))
        return self._newest[1]

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
            if any(other.gang == known.gang for other in self._processes.values()):
                return
            group = self._gangs.pop(known.gang, None)
        if group is not None:
            remove_placement_group(group)
        else:  # an earlier controller made it, if there is one; to find it takes a call
            threading.Thread(target=_disband, args=(known.gang,), daemon=True).start()

    def _gang(self, name: str, size: int, spec: ProcessSpec) -> PlacementGroup:
        """Return the placement group of a gang: one bundle a process, packed on few nodes."""
        if name not in self._gangs:
            bundle = {"CPU": max(spec.num_cpus, _GANG_CPU), **spec.resources}
            if spec.num_gpus:
                bundle["GPU"] = spec.num_gpus
            # Detached: Ray ends the processes in a group together with whoever made it, else.
            self._gangs[name] = placement_group(
                [bundle] * size, strategy="PACK", name=gang_name(name), lifetime="detached"
            )
        return self._gangs[name]


def _disband(gang: str) -> None:
    """Give back what the processes of a gang had asked for together; most have none."""
    try:
        remove_placement_group(get_placement_group(gang_name(gang)))
    except ValueError:
        pass  # it had none
    except (ray.exceptions.RaySystemError, ray.exceptions.RpcError) as error:
        log.warning("%s may hold on to what it asked for: %s", gang, error)


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
