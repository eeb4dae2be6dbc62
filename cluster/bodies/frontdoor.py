"""The body of a front door."""

import asyncio
import os

from cluster.bodies.process import LoopThread, Process
from cluster.config import ClusterConfig
from cluster.control.ports import Opened, Pulse
from cluster.control.status import ClusterStatus
from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.frontdoor.server import FrontDoor
from cluster.frontdoor.tls import TlsFiles
from cluster.runtime.controller import ControllerHandle, find_controller
from cluster.runtime.names import CONTROLLER_NAME
from cluster.runtime.nodes import node_address, node_name
from cluster.telemetry import FrontDoorInstruments
from workers.errors import UnavailableError
from workers.placement import MemberId, Role, View

_CONTROLLER_S = 5.0


class ControllerLink:
    """An `Operator` that asks the controller's actor; asked for anew when it has ended."""

    def __init__(self) -> None:
        self._handle: ControllerHandle | None = None

    async def status(self) -> ClusterStatus:
        """See `Operator`."""
        status = await asyncio.to_thread(self._ask, "status")
        assert isinstance(status, ClusterStatus)
        return status

    async def scale(self, role: Role, count: int) -> int:
        """See `Operator`."""
        before = await asyncio.to_thread(self._ask, "scale", role, count)
        assert isinstance(before, int)
        return before

    async def drain(self, name: str) -> MemberId:
        """See `Operator`."""
        member = await asyncio.to_thread(self._ask, "drain", name)
        assert isinstance(member, MemberId)
        return member

    def _ask(self, method: str, *arguments: object) -> object:
        if self._handle is None:
            self._handle = find_controller(CONTROLLER_NAME)
        try:
            return self._handle.call(method, *arguments, timeout_s=_CONTROLLER_S)
        except UnavailableError:
            self._handle = None
            raise


class FrontDoorBody(Process):
    """One front door."""

    def __init__(
        self,
        member: MemberId,
        model_dir: str,
        host: str,
        config: ClusterConfig,
    ) -> None:
        section, tls = config.front_doors, config.front_doors.tls
        shares_port = not host  # a successor on the same node takes it before this one leaves
        own_port = shares_port or member.name.endswith("-0")
        super().__init__(
            Role.FRONT_DOOR,
            member,
            config.telemetry,
            metrics_port=config.telemetry.metrics_port if own_port else 0,
        )
        self._drain_s = section.drain_s
        self._loop = LoopThread()
        self._door = FrontDoor(
            FrontDoorOptions(
                name=str(member),
                listen=_listen(section.listen, own_port=own_port),
                health_listen=_listen(section.health_listen, own_port=own_port),
                shares_port=shares_port,
                tls=TlsFiles(tls.cert, tls.key, tls.client_ca) if tls.cert else None,
                api_keys_file=section.api_keys_file,
                operators=section.operators,
                max_requests=section.max_requests,
                max_message_bytes=section.max_message_bytes,
                max_waiting=section.max_waiting,
                gateway_wait_s=section.gateway_wait_s,
                gateway_silence_s=section.gateway_silence_s,
                max_deaths=config.gateways.max_deaths,
                prefix_fetch_tokens=_prefix_fetch_tokens(config),
                experts_in_gateway=config.experts.workers == 0,
            ),
            ModelInfo.load(
                model_dir,
                name=config.model.name,
                context_tokens=config.gateways.context_tokens,
            ),
            metrics=FrontDoorInstruments(self.registry, str(member)),
            operator=ControllerLink(),
        )

    def open(self) -> Opened:
        """Say where this front door runs."""
        return self.opened()

    def start(self) -> Opened:
        """Listen to clients."""
        endpoint = self._loop.run(self._door.start(), timeout_s=30.0)
        return Opened(pid=os.getpid(), node=node_name(), endpoint=_reachable(endpoint))

    def adopt(self, view: View) -> None:
        """Take a newer View and connect to its gateways."""
        self._loop.call(self._door.adopt, view, timeout_s=30.0)
        self.note(view)

    def pulse(self) -> Pulse:
        """Say how this front door is."""
        return Pulse(order=self.order, ready=self._door.ready)

    def drain(self) -> None:
        """Take no new requests, let the running ones finish, then close."""
        self._loop.run(self._door.drain(self._drain_s), timeout_s=self._drain_s + 10.0)


def _listen(address: str, *, own_port: bool) -> str:
    """Return where to listen: with a free port where another front door has this one."""
    host, colon, port = address.rpartition(":")
    return f"{host}{colon}{port if own_port else 0}" if address else ""


def _reachable(endpoint: str) -> str:
    """Return where others reach what listens on every address of this node."""
    host, _, port = endpoint.rpartition(":")
    return f"{node_address()}:{port}" if host in {"", "0.0.0.0", "[::]"} else endpoint  # noqa: S104


def _prefix_fetch_tokens(config: ClusterConfig) -> int:
    """Return what fetching a prefix costs; 0 where it could change a bit, or nothing is kept."""
    section = config.gateways
    fetches = section.prefix_cache and not config.dispatch.bit_stable
    return section.prefix_fetch_tokens if fetches else 0
