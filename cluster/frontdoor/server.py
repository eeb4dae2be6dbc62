"""The front door: a gRPC server that clients connect to, and its sessions with gateways."""

import asyncio
from dataclasses import dataclass

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.control.status import StepWatch
from cluster.frontdoor.admission import Admission
from cluster.frontdoor.auth import Authenticator, KeyFile
from cluster.frontdoor.cluster_service import ClusterService, ViewCache
from cluster.frontdoor.gateways import GatewayPool
from cluster.frontdoor.metrics import FrontDoorMetrics, NoMetrics
from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.operator import NoOperator, Operator
from cluster.frontdoor.options import FrontDoorOptions
from cluster.frontdoor.ownership import Ownership
from cluster.frontdoor.service import FrontDoorParts, InferenceService
from cluster.frontdoor.tls import Certificates
from cluster.pb.expertmesh.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from workers.clock import Clock, SystemClock
from workers.errors import ConfigError
from workers.placement import MemberId, View

_log = structlog.get_logger()

_STALL_S = 30.0  # parked rows are a stall too, though nothing is lost by them
_LOOK_S = 1.0
_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontDoorStats:
    """A front door's load, and whether it can serve."""

    in_flight: int
    waiting: int
    ready: bool


class FrontDoor:
    """Serves one model to clients. All methods belong to the event loop that started it.

    Args:
        options: Its settings.
        model: The served model.
        metrics: Where observations go.
        operator: The controller; none when nobody may be asked to change the cluster.
        clock: Measures what the metrics report.

    Raises:
        ConfigError: Certificates or keys cannot be used.
    """

    def __init__(
        self,
        options: FrontDoorOptions,
        model: ModelInfo,
        *,
        metrics: FrontDoorMetrics | None = None,
        operator: Operator | None = None,
        clock: Clock | None = None,
    ) -> None:
        metrics, clock = metrics or NoMetrics(), clock or SystemClock()
        self._operator = operator or NoOperator()
        self._options = options
        self._views = ViewCache(experts_in_gateway=options.experts_in_gateway)
        pool = GatewayPool(options)
        self._parts = FrontDoorParts(
            options=options,
            model=model,
            pool=pool,
            ownership=Ownership(pool),
            admission=Admission(options, metrics),
            authenticator=Authenticator(
                KeyFile(options.api_keys_file, clock) if options.api_keys_file else None,
                by_certificate=options.tls is not None and bool(options.tls.client_ca),
                operators=options.operators,
            ),
            metrics=metrics,
            clock=clock,
        )
        self._certificates = Certificates(options.tls) if options.tls else None
        self._parts.pool.listeners.add(self._health_may_change)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._health_change = asyncio.Lock()
        self._health_tasks: set[asyncio.Task[None]] = set()
        self._step_watches: dict[MemberId, StepWatch] = {}
        self._was_ready = False
        self._server: grpc.aio.Server | None = None
        self._health_server: grpc.aio.Server | None = None
        self.health_address = ""

    async def start(self) -> str:
        """Listen, and return HOST:PORT.

        Raises:
            ConfigError: The address cannot be bound.
        """
        self._server = grpc.aio.server(options=_server_options(self._options))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(self._parts), self._server
        )
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(
            ClusterService(self._parts, self._views, self._operator), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (_INFERENCE, _CLUSTER, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        address = _bind(self._server, self._options.listen, self._certificates)
        if self._options.api_keys_file and self._certificates is None:
            _log.warning("API keys are sent in cleartext here: set front_doors.tls", at=address)
        await self._set_health()
        if self._options.health_listen:
            await self._start_health()
        await self._server.start()
        watch = asyncio.get_running_loop().create_task(self._watch_progress())
        self._health_tasks.add(watch)
        return address

    def adopt(self, view: View) -> None:
        """Take a View if it is newer, and connect to its gateways."""
        if self._views.adopt(view):
            self._parts.pool.adopt(view)
            self._health_may_change()  # experts may be covered now, or no longer

    @property
    def ready(self) -> bool:
        """Whether a request would be served now: a gateway that moves is there, and all experts."""
        return (
            self._views.is_covered
            and self._parts.pool.is_connected
            and not self._is_stalled()
            and not self._parts.admission.is_draining
        )

    def stats(self) -> FrontDoorStats:
        """Return its load."""
        admission = self._parts.admission
        return FrontDoorStats(
            in_flight=admission.num_running, waiting=admission.num_waiting, ready=self.ready
        )

    async def drain(self, deadline_s: float) -> bool:
        """Take no new work, let the running streams finish, then close.

        Returns:
            Whether all of them finished by the deadline; the others are cut off.
        """
        self._parts.admission.is_draining = True
        await self._set_health()
        if self._options.shares_port and self._server is not None:
            # Clients are told to connect again, which leads to whoever else has the port.
            asyncio.get_running_loop().create_task(self._server.stop(deadline_s))
        has_finished = await self._parts.admission.wait_idle(deadline_s)
        await self.close()
        return has_finished

    async def close(self) -> None:
        """Stop at once."""
        self._parts.pool.listeners.discard(self._health_may_change)
        for task in self._health_tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(grace=0.5)  # for the last words of streams that have ended
        if self._health_server is not None:
            await self._health_server.stop(grace=None)
        await self._parts.pool.close()

    async def _start_health(self) -> None:
        """Answer health on a cleartext port of its own, for probes that speak no TLS."""
        self._health_server = grpc.aio.server(options=_server_options(self._options))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
        self.health_address = _bind(self._health_server, self._options.health_listen)
        await self._health_server.start()

    def _is_stalled(self) -> bool:
        """Whether every gateway that has something to do has done nothing for too long."""
        now_s = self._parts.clock.now_s()
        stats = self._parts.pool.stats()
        self._step_watches = {m: self._step_watches.get(m) or StepWatch(_STALL_S) for m in stats}
        for member, word in stats.items():
            self._step_watches[member].note(word, now_s)
        watches = self._step_watches.values()
        return bool(watches) and all(watch.stalled_s(now_s) for watch in watches)

    async def _watch_progress(self) -> None:
        """Change the health when tokens stop moving, of which nobody sends news."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.ready != self._was_ready:
                await self._set_health()

    def _health_may_change(self) -> None:
        task = asyncio.get_running_loop().create_task(self._set_health())
        self._health_tasks.add(task)
        task.add_done_callback(self._health_tasks.discard)

    async def _set_health(self) -> None:
        async with self._health_change:  # whoever comes last sets what holds then
            serving = health_pb2.HealthCheckResponse.SERVING
            not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
            self._was_ready = self.ready
            status = serving if self._was_ready else not_serving
            for name in ("", _INFERENCE):
                await self._health.set(name, status)
            draining = self._parts.admission.is_draining
            await self._health.set(_CLUSTER, not_serving if draining else serving)


def _bind(server: grpc.aio.Server, listen: str, certificates: Certificates | None = None) -> str:
    """Open the port and return HOST:PORT as it is; raises ConfigError."""
    try:
        if certificates is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, certificates.credentials())
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {listen}: {error}") from error
    return f"{listen.rpartition(':')[0]}:{port}"


def _server_options(options: FrontDoorOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(options.shares_port)),  # else a port that is taken is an error
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.keepalive_time_ms", int(options.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(options.keepalive_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(options.keepalive_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ]
