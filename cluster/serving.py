"""A cluster that lasts as long as a context: started, waited for, and drained at the end."""

import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.app import Charge, ControllerBody, ModelFacts, check_startable
from cluster.config import ClusterConfig
from cluster.control.status import ClusterStatus
from cluster.demo.path import demo_model_path
from cluster.runtime.controller import (
    ControllerHandle,
    end_processes,
    running_processes,
    start_controller,
)
from cluster.runtime.names import CONTROLLER_NAME
from cluster.runtime.session import ray_session
from workers.clock import Clock
from workers.errors import ConfigError, ExpertmeshError, RefusedError
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.model.memory import expert_bytes
from workers.model.verify import verify
from workers.placement import Role

_LOOPBACK = "127.0.0.1"  # a cluster on one machine listens to nobody else
_POLL_S = 0.2
_STOP_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that serves."""

    controller: ControllerHandle
    endpoint: str
    log_directory: str

    def status(self) -> ClusterStatus:
        """Return the controller's word on every member."""
        status = self.controller.call("status")
        assert isinstance(status, ClusterStatus)
        return status


def model_directory(config: ClusterConfig) -> Path:
    """Return where the checkpoint lies; `demo` is the one that is shipped."""
    return demo_model_path() if config.model.path == "demo" else Path(config.model.path)


def model_facts(config: ClusterConfig) -> ModelFacts:
    """Read and check a checkpoint before anything starts.

    Raises:
        CheckpointError: The model is unsupported, or tensors are missing, misshapen or truncated.
        ConfigError: There is no such directory, or the tensor-parallel size does not fit the model.
    """
    directory = model_directory(config).resolve()
    if not directory.is_dir():
        raise ConfigError(f"model.path: there is no directory {directory}")
    model = ModelConfig.load(directory)
    model.check_tensor_parallel(config.gateways.tensor_parallel)
    with Checkpoint(directory) as checkpoint:
        verify(checkpoint, model)
        return ModelFacts(
            directory=str(directory),
            name=config.model.name or directory.name,
            num_layers=model.num_layers,
            num_experts=model.num_experts,
            weights_version=checkpoint.fingerprint,
            experts_bytes=model.num_layers
            * model.num_experts
            * expert_bytes(model, getattr(torch, config.compute_dtype)),
        )


@contextlib.contextmanager
def serving(
    config: ClusterConfig,
    *,
    clock: Clock,
    wait: Callable[[float], None],
    ray_address: str | None = None,
    progress: Callable[[ClusterStatus], None] = lambda _status: None,
) -> Iterator[RunningCluster]:
    """Run a cluster until the context ends; it is entered when the first request would succeed.

    Args:
        config: What to run.
        clock: Measures the patience with the start.
        wait: Sleeps that many seconds; what it raises ends the cluster (a signal's way in).
        ray_address: A Ray cluster that is there already; None runs one on this machine.
        progress: Called with the status while the members start.

    Raises:
        RefusedError: Processes of a cluster run there already.
        ExpertmeshError: The cluster did not come up; says which member failed and why.
    """
    model = model_facts(config)
    check_startable(config, model)
    if not ray_address:
        _check_listen(config)
    num_gpus = int(
        config.gateways.num_gpus * config.gateways.tensor_parallel * config.gateways.count
        + config.experts.num_gpus * config.experts.workers
    )
    with (
        _journal(config) as journal,
        ray_session(
            ray_address, logs_to_console=config.telemetry.logs_to_console, num_gpus=num_gpus
        ) as session,
    ):
        _check_alone()  # what ends with this one must have begun with it
        host = "" if ray_address else _LOOPBACK
        charge = Charge(config=config, model=model, journal=journal, host=host)
        controller = start_controller(
            ControllerBody, charge, name=CONTROLLER_NAME, resources=config.control.resources
        )
        try:
            status = await_ready(
                controller,
                timeout_s=config.control.start_timeout_s,
                clock=clock,
                wait=wait,
                progress=progress,
            )
            yield RunningCluster(controller, endpoint_of(status), f"{session}/logs")
        finally:
            stop(controller, config)


def await_ready(
    controller: ControllerHandle,
    *,
    timeout_s: float,
    clock: Clock,
    wait: Callable[[float], None],
    progress: Callable[[ClusterStatus], None],
) -> ClusterStatus:
    """Wait until the first request would succeed.

    Raises:
        ExpertmeshError: The cluster did not come up in time; says which member failed and why.
    """
    deadline_s = clock.now_s() + timeout_s
    status = controller.call("status", timeout_s=timeout_s)
    assert isinstance(status, ClusterStatus)
    while not status.ready:
        progress(status)
        if status.failure or clock.now_s() > deadline_s:
            raise ExpertmeshError(
                status.failure or f"not ready after {timeout_s:g} s: {'; '.join(status.reasons)}"
            )
        wait(_POLL_S)
        status = controller.call("status")
        assert isinstance(status, ClusterStatus)
    progress(status)
    return status


def stop(controller: ControllerHandle, config: ClusterConfig) -> int:
    """Drain every member, then end all processes; returns how many of them were left."""
    drain_s = config.front_doors.drain_s + _STOP_MARGIN_S
    with contextlib.suppress(ExpertmeshError):  # it has ended: nothing is left to stop
        controller.call("stop", drain_s, timeout_s=drain_s + _STOP_MARGIN_S)
    return end_processes()


def _check_alone() -> None:
    if running := running_processes():
        raise RefusedError(
            f"{len(running)} processes of a cluster run on this Ray cluster already, such as "
            f"{running[0]}: `expertmesh apply` changes that cluster, `expertmesh down` ends it"
        )


def _check_listen(config: ClusterConfig) -> None:
    """Find out early what the first front door would find out late; raises ConfigError."""
    section = config.front_doors
    for key, address in (("listen", section.listen), ("health_listen", section.health_listen)):
        host, _, port = address.rpartition(":")
        if not port.isdigit() or int(port) == 0:
            continue
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise ConfigError(
                f"front_doors.{key}: cannot listen on {address}: {error.strerror or error}; take "
                "another port, or 0 for a free one"
            ) from error
    if section.api_keys_file and not Path(section.api_keys_file).is_file():
        raise ConfigError(f"front_doors.api_keys_file: there is no file {section.api_keys_file}")


@contextlib.contextmanager
def _journal(config: ClusterConfig) -> Iterator[str]:
    """Yield the journal's directory: the configured one, or one that ends with the cluster."""
    if config.control.journal:
        yield config.control.journal
        return
    with tempfile.TemporaryDirectory(prefix="expertmesh-journal-") as directory:
        yield directory


def endpoint_of(status: ClusterStatus) -> str:
    """Return where a client connects."""
    return status.view.with_role(Role.FRONT_DOOR)[0].endpoint
