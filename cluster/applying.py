"""A cluster that outlives the command which started it: brought to a configuration, or ended.

Whatever is asked for is done by a controller with the newest configuration, which takes over from
the one before: no token passes through either, and the journal says what runs.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cluster.app import Charge, ControllerBody, check_startable
from cluster.config import ClusterConfig, build_name
from cluster.control.settings import Differences, differences
from cluster.control.status import ClusterStatus
from cluster.runtime.controller import (
    ControllerHandle,
    end_processes,
    find_controller,
    start_controller,
)
from cluster.runtime.names import CONTROLLER_NAME
from cluster.runtime.session import ray_session
from cluster.serving import await_ready, endpoint_of, model_facts, stop
from workers.clock import Clock
from workers.errors import ConfigError, ExpertmeshError, RefusedError, UnavailableError

_POLL_S = 0.5
_TAKE_OVER_S = 30.0  # until the name of a controller that was ended is free

Wait = Callable[[float], None]
Progress = Callable[[ClusterStatus], None]


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of it: who controls the cluster now, where it serves, and what was changed.

    `differences` is None where no cluster ran before; `num_outdated` members run with older
    settings.
    """

    controller: ControllerHandle
    endpoint: str
    differences: Differences | None
    num_outdated: int


@contextlib.contextmanager
def connected(address: str, config: ClusterConfig | None = None) -> Iterator[None]:
    """Join a Ray cluster as long as the context lasts; what runs there goes on afterwards.

    Raises UnavailableError when it is not reached.
    """
    to_console = config is not None and config.telemetry.logs_to_console
    try:
        session = contextlib.ExitStack()
        session.enter_context(ray_session(address, logs_to_console=to_console, num_gpus=0))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnavailableError(f"no Ray cluster is reached at {address}: {error}") from error
    with session:
        yield


def apply(config: ClusterConfig, *, clock: Clock, wait: Wait, progress: Progress) -> Applied:
    """Bring the cluster to a configuration, and wait until it serves.

    What runs is adopted. Counts that the configuration changed are scaled to; settings that only
    new processes take on wait for a rollout.

    Raises:
        ConfigError: There is no journal that a later controller could go on from.
        RefusedError: What changed needs another cluster.
        ExpertmeshError: The cluster did not come up.
    """
    if not config.control.journal:
        raise ConfigError(
            "control.journal: name a directory on storage that outlives the head's node; without "
            "it a controller that is started again would know nothing of what runs"
        )
    wanted = Charge(
        config=config,
        model=model_facts(config),
        journal=config.control.journal,
        build=build_name(),
        resume=True,
    )
    check_startable(config, wanted.model)
    controller, found = _take_over(wanted, clock=clock, wait=wait)
    status = await_ready(
        controller,
        timeout_s=config.control.start_timeout_s,
        clock=clock,
        wait=wait,
        progress=progress,
    )
    num_outdated = sum(member.outdated for member in status.members)
    return Applied(controller, endpoint_of(status), found, num_outdated)


def roll_out(
    controller: ControllerHandle, *, timeout_s: float, clock: Clock, wait: Wait, progress: Progress
) -> int:
    """Replace the outdated members one by one; returns how many there were.

    Raises ExpertmeshError when that took too long, or successors fail to start; the members that
    were not replaced go on to serve.
    """
    deadline_s = clock.now_s() + timeout_s
    count = controller.call("rollout")
    assert isinstance(count, int)
    status = controller.call("status")
    while status.rolling or not status.ready:
        progress(status)
        if status.failure or clock.now_s() > deadline_s:
            left = sum(member.outdated for member in status.members)
            reason = status.failure or f"not finished after {timeout_s:g} s"
            raise ExpertmeshError(
                f"{reason}; {left} members still run with their old settings, and serve"
            )
        wait(_POLL_S)
        with contextlib.suppress(UnavailableError):  # Ray restarts it; the deadline bounds that
            status = controller.call("status")
    return count


def take_down() -> int:
    """Drain and end whatever runs; returns how many processes had to be ended the hard way."""
    try:
        controller = find_controller(CONTROLLER_NAME)
        charge = controller.call("charge")
    except UnavailableError:
        return end_processes()
    assert isinstance(charge, Charge)
    return stop(controller, charge.config)


def running_config() -> ClusterConfig:
    """Return the configuration that the cluster runs with; raises UnavailableError without one."""
    charge = find_controller(CONTROLLER_NAME).call("charge")
    assert isinstance(charge, Charge)
    return charge.config


def _take_over(
    wanted: Charge, *, clock: Clock, wait: Wait
) -> tuple[ControllerHandle, Differences | None]:
    """Return a controller with this charge: the one that runs, or one in its place."""
    try:
        controller = find_controller(CONTROLLER_NAME)
        running = controller.call("charge", timeout_s=wanted.config.control.start_timeout_s)
    except UnavailableError:
        return _started(wanted, clock=clock, wait=wait), None
    assert isinstance(running, Charge)
    found = differences(running.config, wanted.config)
    changed = replace(running, resume=wanted.resume) != wanted
    if _refuses(controller):  # it has changed nothing: another one finds out for itself
        changed = True
    elif running.model != replace(wanted.model, name=running.model.name) or found.never:
        raise RefusedError(
            "a running cluster cannot take this on, since answers that are under way would change, "
            "links would break or members be forgotten: "
            f"{'; '.join(found.never) or 'the checkpoint is another one'}. "
            "Start another cluster, or `expertmesh down` this one first"
        )
    if not changed:
        return controller, found
    controller.end()
    return _started(wanted, clock=clock, wait=wait), found


def _refuses(controller: ControllerHandle) -> bool:
    """Whether a controller decides nothing and never will."""
    with contextlib.suppress(UnavailableError):  # it is busy: what it runs with is known
        return bool(getattr(controller.call("status"), "refuses", False))  # older ones do not tell
    return False


def _started(charge: Charge, *, clock: Clock, wait: Wait) -> ControllerHandle:
    """Start a controller; the name of one that was just ended comes free a moment later."""
    deadline_s = clock.now_s() + _TAKE_OVER_S
    while True:
        try:
            return start_controller(
                ControllerBody,
                charge,
                name=CONTROLLER_NAME,
                resources=charge.config.control.resources,
            )
        except RefusedError:
            if clock.now_s() > deadline_s:
                raise
            wait(_POLL_S)
