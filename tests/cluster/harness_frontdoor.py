"""A front door on a real port, with fake gateways behind real endpoints."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from cluster.endpoint import EndpointOptions, GatewayEndpoint
from cluster.frontdoor.metrics import FrontDoorMetrics
from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.frontdoor.server import FrontDoor
from cluster.pb.expertmesh.v1 import cluster_pb2_grpc, inference_pb2_grpc
from tests.fakes import FakeGateway
from workers.placement import (
    ExpertId,
    Member,
    MemberId,
    MemberState,
    Placement,
    Replica,
    Role,
    View,
)
from workers.types import Request

DEMO = Path(__file__).parents[2] / "cluster" / "demo"
WAIT_S = 10.0
WORKER = MemberId("expert-0", 1)


def saying(model: ModelInfo, *texts: str) -> Callable[[Request, int], Sequence[int]]:
    """Return a reply that says one text per sequence and then ends the turn."""
    replies = [(*model.tokenizer.encode(text), model.eos_token_ids[0]) for text in texts]
    return lambda _, index: replies[index % len(replies)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other threads bring about."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # threads bring it about
            await asyncio.sleep(0.002)


def member_of(number: int, endpoint: str) -> Member:
    """Return a gateway as Views show it."""
    return Member(
        id=MemberId(f"gateway-{number}", 1),
        role=Role.GATEWAY,
        state=MemberState.ACTIVE,
        endpoint=endpoint,
    )


@dataclass
class Door:
    """One more front door and a channel to it."""

    door: FrontDoor
    channel: grpc.aio.Channel

    @property
    def inference(self) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def kill(self) -> None:
        """Break all its streams, to clients and to gateways, as the death of its process does."""
        await self.door.close()
        await self.channel.close()


@dataclass
class Site:
    """What a test holds in its hands."""

    model: ModelInfo
    door: FrontDoor
    address: str
    inference: inference_pb2_grpc.InferenceServiceStub
    cluster: cluster_pb2_grpc.ClusterServiceStub
    channel: grpc.aio.Channel
    gateways: list[FakeGateway] = field(default_factory=list)
    endpoints: list[GatewayEndpoint | None] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    further: list[Door] = field(default_factory=list)
    version: int = 0
    covered: bool = True

    def publish(self) -> None:
        """Let the front door adopt the members as they are now."""
        self.version += 1
        expert = ExpertId(0, 0)
        replicas = {expert: (Replica(WORKER, 0),)} if self.covered else {}
        worker = Member(
            id=WORKER, role=Role.EXPERT_WORKER, state=MemberState.ACTIVE, num_slots=2, pid=99
        )
        placement = Placement("weights-1", 1, 1, replicas)
        view = View(1, self.version, (*self.members, worker), placement)
        for door in (self.door, *(further.door for further in self.further)):
            door.adopt(view)

    async def add_door(self, options: FrontDoorOptions | None = None) -> Door:
        """Serve one more front door for the same gateways."""
        options = options or FrontDoorOptions(name=f"frontdoor-{1 + len(self.further)}")
        door = FrontDoor(options, self.model)
        further = Door(door, grpc.aio.insecure_channel(await door.start()))
        self.further.append(further)
        self.publish()
        pool = door._parts.pool
        await until(lambda: all(session.is_connected for session in pool._sessions.values()))
        return further

    async def add_gateway(self, gateway: FakeGateway, *, publish: bool = True) -> None:
        """Serve a fake gateway and make it a member."""
        number = len(self.members)
        endpoint = GatewayEndpoint(gateway, "127.0.0.1:0", EndpointOptions(stats_interval_s=0.02))
        address = await endpoint.start()
        self.gateways.append(gateway)
        self.endpoints.append(endpoint)
        self.members.append(member_of(number, address))
        if publish:
            self.publish()
            await until(
                lambda: self.door._parts.pool._sessions[self.members[number].id].is_connected
            )

    def set_state(self, number: int, state: MemberState) -> None:
        """Change a gateway's state in the View."""
        self.members[number] = replace(self.members[number], state=state)
        self.publish()

    async def kill_gateway(self, number: int) -> None:
        """Break a gateway's streams and let nobody reach it."""
        endpoint = self.endpoints[number]
        self.endpoints[number] = None
        assert endpoint is not None
        await endpoint.close()

    async def close(self) -> None:
        await self.channel.close()
        await self.door.close()
        for further in self.further:
            await further.kill()
        for number, endpoint in enumerate(self.endpoints):
            if endpoint is not None:
                await self.kill_gateway(number)
        for gateway in self.gateways:
            gateway.close()


@asynccontextmanager
async def front_door(
    *gateways: FakeGateway,
    model: ModelInfo,
    options: FrontDoorOptions | None = None,
    metrics: FrontDoorMetrics | None = None,
) -> AsyncIterator[Site]:
    """Serve a front door with some gateways; all of it is gone afterwards."""
    door = FrontDoor(options or FrontDoorOptions(), model, metrics=metrics)
    address = await door.start()
    channel = grpc.aio.insecure_channel(address)
    site = Site(
        model=model,
        door=door,
        address=address,
        inference=inference_pb2_grpc.InferenceServiceStub(channel),
        cluster=cluster_pb2_grpc.ClusterServiceStub(channel),
        channel=channel,
    )
    try:
        for gateway in gateways:
            await site.add_gateway(gateway)
        yield site
    finally:
        await site.close()
