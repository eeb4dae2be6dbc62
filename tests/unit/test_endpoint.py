"""What becomes of requests whose snapshots or prefix a gateway is still looking for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from cluster import wire
from cluster.endpoint import EndpointOptions, GatewayEndpoint
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from tests.fakes import FakeGateway
from tests.unit.harness_gateway import make_request
from workers.types import PrefixPlace, Request, SnapshotPlace

WAIT_S = 20.0
PREFIX = PrefixPlace(2, "gateway-9.1")


class SlowSource:
    """Finds nothing, once the test says so."""

    def __init__(self) -> None:
        self.asked: list[int] = []  # assignments
        self.heard = asyncio.Semaphore(0)
        self.given_up = asyncio.Semaphore(0)
        self.is_open = asyncio.Event()

    async def find(self, request: Request) -> dict:
        self.asked.append(request.assignment)
        self.heard.release()
        try:
            await self.is_open.wait()
        except asyncio.CancelledError:
            self.given_up.release()
            raise
        return {}


class Door:
    """A front door's end of a session."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self.call = gateway_pb2_grpc.GatewayServiceStub(channel).Session()
        self.name = name

    async def say(self, **command: object) -> None:
        await self.call.write(gateway_pb2.SessionRequest(**command))

    async def greet(self) -> None:
        await self.say(hello=gateway_pb2.Hello(front_door=self.name))

    async def submit(self, request: Request) -> None:
        await self.say(submit=wire.submit_message(request))

    async def hear(self, *kinds: str) -> gateway_pb2.SessionResponse:
        while True:
            response = await self.call.read()
            if response is grpc.aio.EOF or response.WhichOneof("report") in kinds:
                return response


class Site:
    """A gateway's endpoint, and a front door that speaks to it."""

    def __init__(self, gateway: FakeGateway | None = None) -> None:
        self.source = SlowSource()
        self.gateway = gateway or FakeGateway(lambda request, index: (1, 2, 3), hold_after=1)
        options = EndpointOptions(stats_interval_s=0.02)
        self.endpoint = GatewayEndpoint(self.gateway, "127.0.0.1:0", options, source=self.source)


@contextlib.asynccontextmanager
async def site(gateway: FakeGateway | None = None) -> AsyncIterator[tuple[Site, Door, Door]]:
    here = Site(gateway)
    async with asyncio.timeout(WAIT_S):
        address = await here.endpoint.start()
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                doors = Door(channel, "a"), Door(channel, "b")
                for door in doors:
                    await door.greet()
                yield here, *doors
        finally:
            await here.endpoint.close()


def ask(assignment: int = 1, window_s: float = 0.0) -> Request:
    request = make_request(prompt=(1, 2, 3))
    return replace(request, assignment=assignment, prefix=PREFIX, resume_window_s=window_s)


async def test_a_request_begins_when_its_prefix_is_there_or_out_of_reach():
    async with site() as (here, door, _):
        await door.submit(ask())
        await here.source.heard.acquire()
        assert not here.gateway.submitted
        here.source.is_open.set()
        await door.hear("events")
        assert [r.prefix for r in here.gateway.submitted] == [PREFIX]


async def test_an_older_assignment_does_not_drive_out_a_newer_one_that_waits():
    async with site() as (here, door, other):
        await door.submit(ask(5))
        await here.source.heard.acquire()
        await other.submit(ask(4))
        refusal = (await other.hear("refusal")).refusal
        assert (refusal.reason, refusal.held_assignment) == (
            gateway_pb2.REFUSAL_REASON_STALE, 5,
        )  # fmt: skip
        other.call.cancel()
        here.source.is_open.set()
        await door.hear("events")
        assert [r.assignment for r in here.gateway.submitted] == [5]


async def test_a_newer_assignment_takes_the_place_of_one_that_waits():
    async with site() as (here, door, other):
        await door.submit(ask(4))
        await here.source.heard.acquire()
        await other.submit(ask(5))
        await here.source.heard.acquire()
        here.source.is_open.set()
        await other.hear("events")
        assert [r.assignment for r in here.gateway.submitted] == [5]


@pytest.mark.parametrize("how", ["detach", "the front door dies"])
async def test_a_request_that_is_to_go_on_without_its_client_begins(how):
    async with site() as (here, door, _):
        await door.submit(ask(window_s=30.0))
        await here.source.heard.acquire()
        if how == "detach":
            await door.say(detach=gateway_pb2.Detach(request_id="r", assignment=1))
        else:
            door.call.cancel()
        await here.source.given_up.acquire()
        assert [r.prefix for r in here.gateway.submitted] == [PREFIX]
        assert not here.gateway.aborted


async def test_a_request_without_a_window_is_forgotten_with_its_front_door():
    async with site() as (here, door, other):
        await door.submit(ask())
        await here.source.heard.acquire()
        door.call.cancel()
        await here.source.given_up.acquire()
        here.source.is_open.set()
        await other.submit(replace(make_request("next", prompt=(1,)), assignment=2))
        await other.hear("events")
        assert [r.request_id for r in here.gateway.submitted] == ["next"]


async def test_who_waits_at_a_gateway_that_leaves_is_sent_away_before_its_stream_ends():
    async with site() as (here, door, _):
        await door.submit(ask())
        await here.source.heard.acquire()
        here.gateway.is_draining = True
        closing = asyncio.create_task(here.endpoint.close())
        refusal = (await door.hear("refusal")).refusal
        assert refusal.reason == gateway_pb2.REFUSAL_REASON_DRAINING
        await closing


async def test_snapshots_are_waited_for_alike():
    async with site() as (here, door, _):
        place = SnapshotPlace(0, 2, "gateway-9.1")
        await door.submit(replace(ask(), prefix=None, snapshots=(place,)))
        await here.source.heard.acquire()
        here.source.is_open.set()
        await door.hear("events")
        assert [r.snapshots for r in here.gateway.submitted] == [(place,)]


async def test_what_waits_for_a_slow_front_door_is_told_in_messages_of_bounded_size():
    step, steps = 300_000, 6  # a step's tokens take nearly a megabyte
    gateway = FakeGateway(
        lambda request, index: range(20_000, 20_000 + step * steps), tokens_per_step=step
    )
    async with site(gateway) as (_, door, other):
        await door.submit(make_request(prompt=(1, 2, 3), max_tokens=step * steps))
        while not gateway.submitted or gateway.num_running:
            await other.hear("stats")
        num_tokens = 0
        while num_tokens < step * steps:
            response = await door.hear("events")
            assert response.ByteSize() < 3 * 2**20
            num_tokens += sum(len(event.token_ids) for event in response.events.events)
