"""Several front doors: one owner per request id, and a stream goes on through another one."""

import asyncio

import grpc
import pytest

from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc, inference_pb2
from tests.cluster.harness_frontdoor import (
    DEMO,
    WAIT_S,
    front_door,
    member_of,
    saying,
    until,
)
from tests.cluster.test_frontdoor import all_of, rest_of, text_of
from tests.fakes import FakeGateway
from workers.gateway.snapshot import Stamp

GREETING = "the quick brown fox jumps over the lazy dog"
GENERATE = inference_pb2.GenerateRequest


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    return ModelInfo.load(DEMO, name="demo")


def request_of(**more) -> inference_pb2.GenerateRequest:
    return GENERATE(request_id="a", text="x", sampling={"seed": 5}, **more)


def resumed(tokens, **more) -> inference_pb2.GenerateRequest:
    return request_of(resume_from=[{"token_ids": tokens}], **more)


def tokens_of(responses) -> list[int]:
    return [token for response in responses for token in response.token_ids]


async def read_tokens(call, count: int) -> list[int]:
    """Return the first tokens of a call that goes on."""
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += (await call.read()).token_ids
    return tokens


async def code_of(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await rest_of(call)
    return failure.value.code()


@pytest.fixture
def whole(model) -> list[int]:
    return [*model.tokenizer.encode(GREETING), model.eos_token_ids[0]]


@pytest.fixture
def gateways(model) -> list[FakeGateway]:
    return [FakeGateway(saying(model, GREETING), hold_after=4) for _ in range(3)]


def submissions(gateways) -> list:
    return [request for gateway in gateways for request in gateway.submitted]


async def test_a_dead_front_doors_stream_goes_on_through_another_without_computing_again(
    model, gateways, whole
):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        call = first.inference.Generate(request_of(resume_window_s=30), timeout=WAIT_S)
        has = await read_tokens(call, 2)
        await first.kill()
        await until(lambda: any(g.is_held for g in gateways))
        again = second.inference.Generate(resumed(has, resume_window_s=30), timeout=WAIT_S)
        has += await read_tokens(again, 2)  # from what was kept: the gateway stands still
        for gateway in gateways:
            gateway.go_on()
        has += tokens_of(await rest_of(again))

    assert has == whole
    assert len(submissions(gateways)) == 1


async def test_without_a_window_the_request_is_built_again_from_what_the_client_has(
    model, gateways, whole
):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        call = first.inference.Generate(request_of(), timeout=WAIT_S)
        has = await read_tokens(call, 2)
        await first.kill()
        await until(lambda: sum(g.num_running for g in gateways) == 0)
        for gateway in gateways:
            gateway.go_on()
        _, responses = await all_of(second.inference.Generate(resumed(has), timeout=WAIT_S))

    assert has + tokens_of(responses) == whole
    assert [len(r.emitted) for r in submissions(gateways)] == [0, 1]


async def test_the_same_id_is_not_generated_twice_while_its_client_is_there(model, gateways, whole):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        call = first.inference.Generate(request_of(), timeout=WAIT_S)
        has = await read_tokens(call, 2)
        for door in (first, second):
            refused = await code_of(door.inference.Generate(request_of(), timeout=WAIT_S))
            assert refused is grpc.StatusCode.ALREADY_EXISTS
        for gateway in gateways:
            gateway.go_on()
        has += tokens_of(await rest_of(call))

    assert has == whole
    assert len(submissions(gateways)) == 1


@pytest.mark.parametrize("same_door", [True, False])
async def test_a_client_that_comes_back_takes_over_from_its_older_call(
    model, gateways, whole, same_door
):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        older = first.inference.Generate(request_of(), timeout=WAIT_S)
        has = await read_tokens(older, 2)
        newer = (first if same_door else second).inference.Generate(resumed(has), timeout=WAIT_S)
        has += await read_tokens(newer, 1)
        assert await code_of(older) is grpc.StatusCode.ALREADY_EXISTS
        for gateway in gateways:
            gateway.go_on()
        has += tokens_of(await rest_of(newer))
        await until(lambda: first.door.stats().in_flight == second.door.stats().in_flight == 0)

    assert has == whole
    assert len(submissions(gateways)) == 1
    assert not any(g.aborted for g in gateways)


async def test_a_client_that_is_gone_in_its_window_may_come_back_without_any_token(
    model, gateways, whole
):
    async with front_door(*gateways, model=model) as site:
        second = await site.add_door()
        call = site.inference.Generate(request_of(resume_window_s=30), timeout=WAIT_S)
        await read_tokens(call, 2)
        call.cancel()
        await until(lambda: site.door.stats().in_flight == 0)
        for gateway in gateways:
            gateway.go_on()
        _, responses = await all_of(second.inference.Generate(request_of(), timeout=WAIT_S))

    assert tokens_of(responses) == whole
    assert len(submissions(gateways)) == 1


async def test_tokens_are_kept_after_the_end_for_who_lost_the_last_message(model, gateways, whole):
    for gateway in gateways:
        gateway.go_on()
    async with front_door(*gateways, model=model) as site:
        second = await site.add_door()
        asked = request_of(resume_window_s=30, output={"logprobs": 1})
        _, told = await all_of(site.inference.Generate(asked, timeout=WAIT_S))
        for has in (0, 3, len(whole) - 1):
            again = resumed(whole[:has], resume_window_s=30, output={"logprobs": 1})
            _, responses = await all_of(second.inference.Generate(again, timeout=WAIT_S))
            assert tokens_of(responses) == whole[has:]
            assert responses[0].first_token_index == has
            assert sum(len(r.logprobs) for r in responses) == len(whole) - has
            assert responses[-1].finish == told[-1].finish

    assert len(submissions(gateways)) == 1


async def test_what_nobody_comes_back_for_is_freed_when_its_window_has_passed(model, gateways):
    async with front_door(*gateways, model=model) as site:
        call = site.inference.Generate(request_of(resume_window_s=0.3), timeout=WAIT_S)
        await read_tokens(call, 2)
        call.cancel()
        await until(lambda: site.door.stats().in_flight == 0)
        assert sum(g.num_running for g in gateways) == 1
        await until(lambda: sum(g.num_running for g in gateways) == 0)


async def test_a_request_that_is_no_beginning_of_what_is_kept_is_computed_anew(model, gateways):
    async with front_door(*gateways, model=model) as site:
        second = await site.add_door()
        call = site.inference.Generate(request_of(resume_window_s=30), timeout=WAIT_S)
        await read_tokens(call, 2)
        other = GENERATE(request_id="a", text="y", resume_from=[{}])
        newer = second.inference.Generate(other, timeout=WAIT_S)
        await until(lambda: len(submissions(gateways)) == 2)
        for gateway in gateways:
            gateway.go_on()
        assert text_of(await rest_of(newer)) == GREETING

    assert len([i for g in gateways for i in g.aborted]) == 1


async def test_any_front_door_cancels_a_request(model, gateways):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        call = first.inference.Generate(request_of(), timeout=WAIT_S)
        await read_tokens(call, 2)
        await second.inference.Cancel(inference_pb2.CancelRequest(request_id="a"))
        (end,) = [r for r in await rest_of(call) if r.HasField("finish")]
        assert end.finish.reason == inference_pb2.FINISH_REASON_CANCELLED
        await until(lambda: sum(g.num_running for g in gateways) == 0)
        unknown = second.inference.Cancel(inference_pb2.CancelRequest(request_id="b"))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await unknown
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_request_without_a_client_is_cancelled_too(model, gateways):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        call = first.inference.Generate(request_of(resume_window_s=30), timeout=WAIT_S)
        await read_tokens(call, 2)
        await first.kill()
        await until(lambda: len(site.door._parts.pool.directories("a")) == 2)
        await second.inference.Cancel(inference_pb2.CancelRequest(request_id="a"))
        await until(lambda: sum(g.num_running for g in gateways) == 0)


async def test_a_front_door_and_the_requests_gateway_die_together(model, gateways, whole):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        call = first.inference.Generate(request_of(resume_window_s=30), timeout=WAIT_S)
        has = await read_tokens(call, 3)
        (number,) = [n for n, gateway in enumerate(gateways) if gateway.num_running]
        await asyncio.gather(first.kill(), site.kill_gateway(number))
        for gateway in gateways:
            gateway.go_on()
        again = resumed(has, resume_window_s=30)
        _, responses = await all_of(second.inference.Generate(again, timeout=WAIT_S))

    assert has + tokens_of(responses) == whole


async def test_who_takes_over_learns_where_snapshots_are_kept(model, gateways):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        call = first.inference.Generate(request_of(), timeout=WAIT_S)
        has = await read_tokens(call, 3)
        (number,) = [n for n, gateway in enumerate(gateways) if gateway.num_running]
        stamp = Stamp(
            request_id="a",
            sequence_index=0,
            assignment=gateways[number].submitted[0].assignment,
            position=2,
            weights_version="",
            tokens=b"",
        )
        keeper = str(site.members[(number + 1) % 3].id)
        site.endpoints[number].report(stamp, keeper)
        tenure = first.door._parts.ownership._held
        await until(lambda: any(h.holder.claim.snapshot_holder for h in tenure.values()))
        await asyncio.gather(first.kill(), site.kill_gateway(number))
        await until(lambda: len(second.door._parts.pool.stats()) == 2)
        again = second.inference.Generate(resumed(has), timeout=WAIT_S)
        await again.read()
        taker = gateways[(number + 1) % 3]  # it is preferred, since it has the snapshot
        await until(lambda: taker.submitted)
        again.cancel()

    (place,) = taker.submitted[0].snapshots
    assert place.holder == keeper


async def test_the_directory_may_die_and_its_deputy_still_knows_the_owner(model, gateways, whole):
    async with front_door(*gateways, model=model) as site:
        first, second = await site.add_door(), await site.add_door()
        directory = second.door._parts.pool.directories("a")[0].member.id
        (number,) = [n for n, member in enumerate(site.members) if member.id == directory]
        gateways[number].is_draining = True  # so that another one runs it
        call = first.inference.Generate(request_of(resume_window_s=30), timeout=WAIT_S)
        has = await read_tokens(call, 2)
        await site.kill_gateway(number)
        await until(lambda: len(second.door._parts.pool.stats()) == 2)
        refused = await code_of(second.inference.Generate(request_of(), timeout=WAIT_S))
        assert refused is grpc.StatusCode.ALREADY_EXISTS
        await first.kill()
        for gateway in gateways:
            gateway.go_on()
        again = resumed(has, resume_window_s=30)
        _, responses = await all_of(second.inference.Generate(again, timeout=WAIT_S))

    assert has + tokens_of(responses) == whole
    assert len(submissions(gateways)) == 1


class LateGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """Takes a request, says nothing more until it is thawed, and then says all that it has."""

    def __init__(self, tokens):
        self._tokens = tokens
        self.submits: list[gateway_pb2.Submit] = []
        self.aborts: list[gateway_pb2.Abort] = []
        self.num_sessions = 0
        self.thawed = asyncio.Event()

    async def Session(self, request_iterator, context):
        self.num_sessions += 1
        if self.submits:
            await self.thawed.wait()
        yield gateway_pb2.SessionResponse(stats={})
        async for command in request_iterator:
            match command.WhichOneof("command"):
                case "abort":
                    self.aborts.append(command.abort)
                case "submit":
                    self.submits.append(command.submit)
                    event = gateway_pb2.TokenEvent(
                        request_id=command.submit.request_id,
                        assignment=command.submit.assignment,
                        token_ids=self._tokens[:2],
                    )
                    yield gateway_pb2.SessionResponse(events={"events": [event]})
                    await self.thawed.wait()
                    event.first_token_index, event.token_ids[:] = 2, self._tokens[2:]
                    yield gateway_pb2.SessionResponse(events={"events": [event]})


async def test_a_gateway_that_falls_silent_is_left_and_what_it_says_later_reaches_nobody(
    model, whole
):
    late = LateGateway(whole[:1] * 9)
    server = grpc.aio.server()
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(late, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = FrontDoorOptions(gateway_silence_s=0.4, reconnect_s=0.05)
    async with front_door(model=model, options=options) as site:
        site.members.append(member_of(0, f"127.0.0.1:{port}"))
        site.publish()
        await until(lambda: late.num_sessions == 1)
        call = site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S)
        has = await read_tokens(call, 2)
        reply = [*has, *whole[2:]]
        other = FakeGateway(lambda *_: reply, hold_after=4)
        await site.add_gateway(other)
        has += await read_tokens(call, 2)
        late.thawed.set()
        await until(lambda: late.aborts)  # it is back, and told to let go
        other.go_on()
        has += tokens_of(await rest_of(call))
        await site.door.close()
    await server.stop(None)

    assert has == [whole[0]] * 2 + whole[2:]
    assert late.aborts[0].assignment == late.submits[0].assignment < other.submitted[0].assignment


async def poisoned(site, request_id: str, gateways) -> grpc.StatusCode:
    """Kill each gateway that a request comes to; return how the request ends."""
    call = site.inference.Generate(GENERATE(request_id=request_id, text="x"), timeout=WAIT_S)
    rest = asyncio.create_task(code_of(call))
    for number, gateway in enumerate(gateways):
        await until(lambda gateway=gateway: gateway.num_running > 0 or rest.done())
        if rest.done():
            break
        await site.kill_gateway(number)
        if number + 1 < len(gateways):
            await site.add_gateway(gateways[number + 1])
    return await rest


async def test_a_request_that_was_at_three_deaths_fails_and_is_remembered(model, gateways):
    spare = FakeGateway(saying(model, GREETING), hold_after=4)
    async with front_door(gateways[0], model=model) as site:
        code = await poisoned(site, "a", [*gateways, spare])
        assert code is grpc.StatusCode.INTERNAL
        assert [g.submitted[0].deaths for g in gateways] == [0, 1, 2]
        assert not spare.submitted


async def test_suspects_run_one_at_a_time_and_only_the_guilty_one_fails(model, gateways, whole):
    """Two requests see two deaths together; then each is alone with what happens to it."""
    last = [FakeGateway(saying(model, GREETING), hold_after=4) for _ in range(2)]
    chain = [*gateways[:2], *last]
    async with front_door(chain[0], model=model) as site:
        calls = {
            name: site.inference.Generate(GENERATE(request_id=name, text="x"), timeout=WAIT_S)
            for name in ("guilty", "innocent")
        }
        ends = {name: asyncio.create_task(rest_of(call)) for name, call in calls.items()}
        for number in (0, 1):
            await until(lambda number=number: chain[number].num_running == 2)
            await site.kill_gateway(number)
            await site.add_gateway(chain[number + 1])
        await until(lambda: chain[2].num_running == 1)
        await asyncio.sleep(0.2)  # the other one is refused meanwhile
        assert chain[2].num_running == 1
        (victim,) = chain[2].submitted
        await site.kill_gateway(2)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await ends.pop(victim.request_id)
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        await site.add_gateway(chain[3])
        chain[3].go_on()
        (survivor,) = ends.values()
        assert tokens_of(await survivor) == whole
