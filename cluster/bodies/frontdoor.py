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
from cluster.runtime import CONTROLLER_NAME, ControllerHandle, find_controller, node_name
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
        listen: str,
        metrics_port: int,
        config: ClusterConfig,
    ) -> None:
        super().__init__(Role.FRONT_DOOR, member, config.telemetry, metrics_port=metrics_port)
        self._drain_s = config.front_doors.drain_s
        self._loop = LoopThread()
        self._door = FrontDoor(
            FrontDoorOptions(
                name=str(member),
                listen=listen,
                max_requests=config.front_doors.max_requests,
                max_message_bytes=config.front_doors.max_message_bytes,
                max_waiting=config.front_doors.max_waiting,
                gateway_wait_s=config.front_doors.gateway_wait_s,
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
        return Opened(pid=os.getpid(), node=node_name(), endpoint=endpoint)

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
