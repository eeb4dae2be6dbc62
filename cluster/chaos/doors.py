"""The front doors of a cluster, found by whoever knows one of them."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.chaos.cable import Cable
from cluster.pb.expertmesh.v1 import cluster_pb2
from cluster.pb.expertmesh.v1.cluster_pb2_grpc import ClusterServiceStub
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from workers.errors import UnavailableError

_LOOK_S = 0.5
_LOOK_DEADLINE_S = 2.0
_RECONNECT_MS = 200
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS),
    ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS),
    ("grpc.use_local_subchannel_pool", 1),
)


Connect = Callable[[str], grpc.aio.Channel]


@dataclass(frozen=True, slots=True)
class Door:
    """One front door: a channel to it, through a cable if it is to be cut."""

    endpoint: str
    channel: grpc.aio.Channel
    cable: Cable | None

    @property
    def inference(self) -> Any:  # noqa: ANN401 - the async form of the stub has no class
        """What requests are sent with."""
        return InferenceServiceStub(self.channel)

    @property
    def cluster(self) -> Any:  # noqa: ANN401 - the async form of the stub has no class
        """What operators ask with."""
        return ClusterServiceStub(self.channel)


class Doors:
    """Keeps channels to all front doors that the View names, as they come and go."""

    def __init__(
        self,
        server: str,
        *,
        seed: int,
        with_cables: bool = False,
        connect: Connect | None = None,
    ) -> None:
        self._first = server
        self._connect = connect or _in_cleartext
        self._with_cables = with_cables
        self._draw = random.Random(f"{seed}/doors")  # noqa: S311 - a load, not a secret
        self._doors: dict[str, Door] = {}
        self._retired: list[Door] = []
        self._adopting = asyncio.Lock()
        self._adopted = (0, 0)  # term and version

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Doors"]:
        """Follow the View as long as the context lasts."""
        await self._add(self._first)
        await self._look()
        following = asyncio.create_task(self._follow())
        try:
            yield self
        finally:
            following.cancel()
            await asyncio.wait([following])
            await self._close()

    def pick(self, other_than: Door | None = None) -> Door:
        """Return any of them; another one than the given, if there is another."""
        doors = [door for door in self._doors.values() if door is not other_than]
        return self._draw.choice(doors or list(self._doors.values()))

    @property
    def endpoints(self) -> list[str]:
        """Where they listen, of those that the View has named last."""
        return sorted(self._doors)

    def cut(self) -> tuple[str, ...]:
        """Cut the clients' connections to one front door, now and then at their end only."""
        door = self.pick()
        assert door.cable is not None
        one_end = self._draw.random() < 0.5
        number = door.cable.cut(one_end=one_end)
        return (f"{number} to {door.endpoint}" + (", at one end" if one_end else ""),)

    async def adopt(self, view: cluster_pb2.View) -> None:
        """Open and drop channels as a View says; an older one than the last changes nothing.

        Who kills front doors on the strength of a View must have this adopt it before: whoever
        knows dead ones only finds no other.
        """
        named = {
            member.endpoint
            for member in view.members
            if member.role == cluster_pb2.ROLE_FRONT_DOOR
            and member.state == cluster_pb2.MEMBER_STATE_ACTIVE
        }
        async with self._adopting:
            if (view.term, view.version) < self._adopted:
                return
            self._adopted = (view.term, view.version)
            for endpoint in named - self._doors.keys():
                await self._add(endpoint)
            for endpoint in self._doors.keys() - named if named else ():
                self._retire(endpoint)

    async def ask(self, method: str, message: Any, timeout_s: float) -> Any:  # noqa: ANN401
        """Ask the cluster through any front door that answers.

        Raises:
            UnavailableError: None does.
        """
        problem = ""
        for door in self._draw.sample(list(self._doors.values()), len(self._doors)):
            try:
                return await getattr(door.cluster, method)(message, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() not in {
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                }:
                    raise
                problem = f"{error.code().name}: {error.details()}"
        raise UnavailableError(f"no front door answers: {problem}")

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._look()

    async def _look(self) -> None:
        """Ask for the View."""
        try:
            answer = await self.ask("GetView", cluster_pb2.GetViewRequest(), _LOOK_DEADLINE_S)
        except UnavailableError:
            return
        await self.adopt(answer.view)

    async def _add(self, endpoint: str) -> None:
        cable = Cable(endpoint) if self._with_cables else None
        reached_at = await cable.lay() if cable is not None else endpoint
        channel = self._connect(reached_at)
        self._doors[endpoint] = Door(endpoint, channel, cable)

    def _retire(self, endpoint: str) -> None:
        """Send nothing new through a front door; what runs through it may end by itself."""
        self._retired.append(self._doors.pop(endpoint))

    async def _close(self) -> None:
        for door in (*self._doors.values(), *self._retired):
            await door.channel.close(None)
            if door.cable is not None:
                await door.cable.close()


def _in_cleartext(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
