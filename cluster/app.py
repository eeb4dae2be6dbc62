"""The composition root: turns a configuration into blueprints, a controller and its cluster."""

import importlib
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog

from cluster.config import ClusterConfig, ProcessSection, ray_environment
from cluster.control.controller import Blueprint, Controller
from cluster.control.journal import DirectoryJournal
from cluster.control.node_demand import NodeDemand, NoNodes
from cluster.control.options import (
    ControllerOptions,
    Desired,
    ExpertScaling,
    GatewayScaling,
    RebalanceOptions,
    ScalingOptions,
)
from cluster.control.planner import slots_needed
from cluster.control.ports import Actuator, ProcessId, ProcessSpec
from cluster.control.settings import digests, fixed_values
from cluster.control.status import ClusterStatus
from cluster.runtime.actors import RayRuntime
from cluster.runtime.controller import running_processes, was_restarted
from cluster.runtime.names import CONTROLLER_NAME
from cluster.runtime.nodes import node_addresses, node_name
from cluster.telemetry import configure_logging
from workers.clock import SystemClock
from workers.dispatch.nccl_environment import NCCL_ENVIRONMENT
from workers.errors import ConfigError, UnavailableError
from workers.placement import Member, MemberId, MemberState, Placement, Role

_TICK_S = 0.05
_JOURNAL_RETRY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the control plane must know of a model, from its checkpoint."""

    directory: str
    name: str
    num_layers: int
    num_experts: int
    weights_version: str
    experts_bytes: int = 0  # of all experts, one copy of each


def floor_of(config: ClusterConfig, model: ModelFacts) -> int:
    """Return how many copies of every expert are wanted: 2 where memory allows, unless it is set.

    Allowed is half of this machine's memory, which the workers of an embedded cluster share.
    """
    if config.experts.floor:
        return config.experts.floor
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = 2 * model.experts_bytes <= memory_bytes // 2
    return 2 if fits and not config.experts.num_gpus else 1


def desired_of(
    config: ClusterConfig, model: ModelFacts, *, build: str = "", num_slots: int = 0
) -> Desired:
    """Return how many members the configuration wants, and how many slots each worker has.

    Args:
        config: What is wanted.
        model: The served model.
        build: Names the program that the members are to run.
        num_slots: Slots of the workers that run already; further ones have no fewer.
    """
    workers, floor = config.experts.workers, floor_of(config, model)
    cells = config.control.cells
    fewest = min(config.experts.min or workers, workers) // cells
    needed = slots_needed(model.num_layers, model.num_experts, fewest, floor) if workers else 0
    slots, a_cell = config.experts.slots, workers // cells
    most = max((slots, *config.experts.pool_slots.values()))
    if slots and workers and most * a_cell < model.num_layers * model.num_experts:
        raise ConfigError(
            f"experts.slots: {most} slots on {a_cell} workers cannot hold the "
            f"{model.num_layers * model.num_experts} experts of {model.name}; "
            f"at least {needed} are needed, or 0 for an even share"
        )
    return Desired(
        members={
            Role.EXPERT_WORKER: workers,
            Role.GATEWAY: config.gateways.count,
            Role.FRONT_DOOR: config.front_doors.count,
        },
        num_slots=slots or max(needed, num_slots if workers else 0),
        pool_slots=config.experts.pool_slots,
        floor=floor,
        standby={
            Role.EXPERT_WORKER: config.experts.standby if workers else 0,
            Role.GATEWAY: config.gateways.standby,
        },
        cells=cells,
        max_workers=config.experts.max,
        max_gateways=config.gateways.cell_ranks // config.gateways.tensor_parallel,
        settings=digests(config, build),
        fixed=fixed_values(config),
    )


def blueprints_of(
    config: ClusterConfig, model: ModelFacts, num_slots: int, host: str
) -> Mapping[Role, Blueprint]:
    """Return, for each role, how the processes of one member are started.

    They listen at `host`, or where it is empty at the address of the node that each comes to.
    """

    def gateway(member: MemberId) -> tuple[ProcessSpec, ...]:
        size = config.gateways.tensor_parallel
        return tuple(
            ProcessSpec(
                id=ProcessId(member, rank),
                role=Role.GATEWAY,
                body="cluster.bodies.gateway:GatewayBody",
                arguments=(member, rank, model.directory, host, config),
                num_cpus=config.gateways.num_cpus,
                num_gpus=config.gateways.num_gpus,
                resources=config.gateways.resources,
                gang=(str(member), size) if size > 1 else None,
                environment=_environment(config.gateways),
            )
            for rank in range(size)
        )

    def expert_worker(member: MemberId) -> tuple[ProcessSpec, ...]:
        return (
            ProcessSpec(
                id=ProcessId(member),
                role=Role.EXPERT_WORKER,
                body="cluster.bodies.expert:ExpertWorkerBody",
                arguments=(member, model.directory, num_slots, host, config),
                num_cpus=config.experts.num_cpus,
                num_gpus=config.experts.num_gpus,
                resources=config.experts.resources,
                environment=_environment(config.experts),
            ),
        )

    def front_door(member: MemberId) -> tuple[ProcessSpec, ...]:
        return (
            ProcessSpec(
                id=ProcessId(member),
                role=Role.FRONT_DOOR,
                body="cluster.bodies.frontdoor:FrontDoorBody",
                arguments=(member, model.directory, host, config),
                num_cpus=config.front_doors.num_cpus,
                resources=config.front_doors.resources,
                environment=_environment(config.front_doors),
            ),
        )

    return {
        Role.GATEWAY: gateway,
        Role.EXPERT_WORKER: expert_worker,
        Role.FRONT_DOOR: front_door,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What a controller is to run, where its processes listen, and where its journal lies.

    With `resume` it goes on where the journal ends; one that Ray restarted does so in any case.
    """

    config: ClusterConfig
    model: ModelFacts
    journal: str
    host: str = ""
    build: str = ""
    resume: bool = False


def scaling_of(config: ClusterConfig) -> ScalingOptions:
    """Return how the numbers of members follow load."""
    section = config.autoscaler
    return ScalingOptions(
        experts=ExpertScaling(**section.experts.model_dump()),
        gateways=GatewayScaling(**section.gateways.model_dump()),
        period_s=section.period_s,
        ahead_s=section.ahead_s,
    )


def check_startable(config: ClusterConfig, model: ModelFacts) -> None:
    """Find what a controller would refuse, before one is started or ended for it.

    Raises ConfigError.
    """
    desired_of(config, model)
    if config.autoscaler.actuator != "ray" and importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            "autoscaler.actuator kuberay: its client is missing; install expertmesh[kubernetes]"
        )


def actuator_of(config: ClusterConfig) -> Actuator:
    """Return what brings nodes and takes them away; its trouble is told in the status."""
    section = config.autoscaler.kuberay
    if config.autoscaler.actuator == "ray":
        return NodeDemand()
    module = importlib.import_module("cluster.kuberay")  # only who asks for it has its package
    try:
        client = module.in_cluster_client()
    except ConfigError as error:
        return NoNodes(str(error))
    actuator: Actuator = module.KubeRayPatch(
        client,
        namespace=section.namespace,
        cluster=section.cluster,
        groups={
            Role.EXPERT_WORKER: section.experts,
            Role.GATEWAY: section.gateways,
            Role.FRONT_DOOR: section.front_doors,
        },
        addresses=node_addresses,
    )
    return actuator


def _controller_of(charge: Charge, actuator: Actuator) -> Controller:
    """Return a controller that goes on where the journal ends; OSError where that is away."""
    config, model = charge.config, charge.model
    control, clock = config.control, SystemClock()
    journal = DirectoryJournal(Path(charge.journal))
    resume = charge.resume or was_restarted()
    record = journal.latest() if resume else None
    running = record.view.with_role(Role.EXPERT_WORKER) if record else ()
    num_slots = max((worker.num_slots for worker in running), default=0)
    desired = desired_of(config, model, build=charge.build, num_slots=num_slots)
    return Controller(
        desired,
        Placement(model.weights_version, model.num_layers, model.num_experts),
        blueprints_of(config, model, desired.num_slots, charge.host),
        runtime=RayRuntime(clock),
        journal=journal,
        clock=clock,
        options=ControllerOptions(
            pulse_s=control.pulse_s,
            silence_s=control.silence_s,
            lost_s=control.lost_s,
            restore_s=control.restore_s,
            allow_chaos=control.allow_chaos,
            rebalance=RebalanceOptions(
                period_s=control.rebalance_s,
                min_gain=control.rebalance_gain,
                max_moves=control.rebalance_moves,
                always=control.rebalance_always,
            ),
            scaling=scaling_of(config),
        ),
        actuator=actuator,
        resume=resume,
        running=() if record and record.view.members else running_processes(),
    )


def _once_there_is_a_journal(begin: Callable[[], Controller]) -> Controller:
    """Try again until journal and Ray can be used; members go on to serve meanwhile."""
    while True:
        try:
            return begin()
        except (OSError, UnavailableError):
            structlog.get_logger("controller").exception("the controller cannot begin yet")
            time.sleep(_JOURNAL_RETRY_S)


class ControllerBody:
    """The controller's process: ticks, and answers the command line and the front doors.

    Ray restarts it when it dies; it then goes on where the journal ends.
    """

    def __init__(self, charge: Charge) -> None:
        level = charge.config.telemetry.log_level
        configure_logging(Role.CONTROLLER.value, CONTROLLER_NAME, level)
        self._charge = charge
        self._lock = threading.Lock()
        actuator = actuator_of(charge.config)
        begin = partial(_controller_of, charge, actuator)
        # Ray starts no actor again whose constructor has raised: what was restarted has to wait.
        self._controller = _once_there_is_a_journal(begin) if was_restarted() else begin()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def status(self) -> ClusterStatus:
        """Return the cluster as the controller knows it."""
        with self._lock:
            status = self._controller.status()
        me = Member(
            id=MemberId(Role.CONTROLLER.value, status.view.term),
            role=Role.CONTROLLER,
            state=MemberState.ACTIVE,
            node=node_name(),
            pid=os.getpid(),
        )
        return replace(status, controller=me)

    def scale(self, role: Role, count: int) -> int:
        """See `Controller.scale`."""
        with self._lock:
            return self._controller.scale(role, count)

    def drain(self, name: str) -> MemberId:
        """See `Controller.drain`."""
        with self._lock:
            return self._controller.drain(name)

    def charge(self) -> Charge:
        """Return what this controller was told to run."""
        return self._charge

    def rollout(self) -> int:
        """See `Controller.rollout`."""
        with self._lock:
            return self._controller.rollout()

    def stop(self, deadline_s: float) -> bool:
        """Drain every member; says whether all were gone by the deadline."""
        with self._lock:
            self._controller.stop()
        return self._ended.wait(deadline_s)

    def _run(self) -> None:
        try:
            while not self._ended.wait(_TICK_S):
                with self._lock:
                    self._controller.tick()
                    if self._controller.stopped or self._controller.superseded:
                        self._controller.close()
                        self._ended.set()
        except BaseException:  # noqa: BLE001 - whatever it is, the process must not survive it
            structlog.get_logger("controller").exception("the controller's loop broke")
            os._exit(1)  # a process that answers while its loop is dead would look healthy


def _environment(section: ProcessSection) -> dict[str, str]:
    """Return what a process must find in its environment before it imports anything."""
    threads = str(section.threads)
    return {
        **ray_environment(),
        **(NCCL_ENVIRONMENT if section.num_gpus else {}),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads),
    }
