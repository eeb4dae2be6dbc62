"""A front door leaves while its successor on the same node has its port already."""

import asyncio
import contextlib

import grpc
import pytest

from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from tests.cluster.harness_frontdoor import DEMO, WAIT_S, front_door, saying, until
from tests.fakes import FakeGateway
from workers.errors import ConfigError

GONE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
CLIENTS = 8


@pytest.fixture(scope="module")
def model():
    return ModelInfo.load(DEMO)


async def generate(stub: InferenceServiceStub) -> str:
    """Ask, and ask again when the front door goes before it has said anything."""
    for _ in range(50):
        call, texts = stub.Generate(pb.GenerateRequest(text="x"), timeout=WAIT_S), []
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for response in call:
                texts.append(response.text)  # noqa: PERF401  # what came before it broke
        if await call.code() is grpc.StatusCode.OK:
            return "".join(texts)
        assert await call.code() in GONE
        assert not any(texts), f"cut off after {texts}"
        await asyncio.sleep(0.02)
    raise AssertionError("no front door answers")


async def test_running_streams_finish_and_new_requests_go_to_the_successor(model):
    old_gateway = FakeGateway(saying(model, "from the old one"), hold_after=1)
    new_gateway = FakeGateway(saying(model, "from the new one"))
    options = FrontDoorOptions(listen="127.0.0.1:0", shares_port=True)
    async with front_door(old_gateway, model=model, options=options) as old:
        running = InferenceServiceStub(old.channel).Generate(
            pb.GenerateRequest(text="x"), timeout=WAIT_S
        )
        await until(lambda: old_gateway.is_held)
        successor = FrontDoorOptions(listen=old.address, shares_port=True)
        async with front_door(new_gateway, model=model, options=successor) as new:
            assert new.address == old.address
            drained = asyncio.create_task(old.door.drain(WAIT_S))
            await until(lambda: old.door._parts.admission.is_draining)

            asked = [generate(old.inference) for _ in range(CLIENTS)]
            assert await asyncio.gather(*asked) == ["from the new one"] * CLIENTS
            old_gateway.go_on()

            assert "".join([r.text async for r in running]) == "from the old one"
            assert await drained
            assert await generate(old.inference) == "from the new one"


async def test_a_port_that_is_not_shared_is_an_error_for_who_comes_second(model):
    async with front_door(model=model) as site:
        second = FrontDoorOptions(listen=site.address)
        with pytest.raises(ConfigError, match="cannot listen"):
            async with front_door(model=model, options=second):
                pass
