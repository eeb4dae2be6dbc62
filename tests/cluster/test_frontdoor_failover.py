"""Gateways that die, drain, refuse or speak out of turn: every token once, nothing lost."""

import asyncio
from hashlib import sha256

import grpc
import pytest

from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.ownership.directory import GRANT
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc, inference_pb2
from tests.cluster.harness_frontdoor import DEMO, WAIT_S, front_door, saying, until
from tests.cluster.test_frontdoor import all_of, text_of, tokens_of
from tests.fakes import FakeGateway
from workers.gateway.prefix_digest import prefix_digest
from workers.gateway.snapshot import Stamp
from workers.placement import MemberState

GREETING = "the quick brown fox jumps over the lazy dog"
GENERATE = inference_pb2.GenerateRequest


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    return ModelInfo.load(DEMO, name="demo")


async def test_a_stream_goes_on_at_another_gateway_without_gap_or_repeat(model):
    texts = (GREETING, "a b", "sphinx of black quartz judge my vow")
    gateways = [FakeGateway(saying(model, *texts), hold_after=n) for n in (4, 6, None)]
    async with front_door(gateways[0], model=model) as site:
        request = GENERATE(
            request_id="a",
            text="x",
            sampling={"num_sequences": 3, "seed": 5},
            output={"logprobs": 0},
        )
        task = asyncio.create_task(all_of(site.inference.Generate(request, timeout=WAIT_S)))
        for number in range(2):
            old, new = gateways[number : number + 2]
            await until(lambda old=old: old.is_held)
            await site.kill_gateway(number)
            await until(lambda old=old: old.num_running == 0)
            await site.add_gateway(new)
        _, responses = await task
    assert [text_of(responses, i) for i in range(3)] == list(texts)
    for i, text in enumerate(texts):
        assert tokens_of(responses, i) == [*model.tokenizer.encode(text), model.eos_token_ids[0]]
    requests = [gateway.submitted[0] for gateway in gateways]
    assert [r.assignment - GRANT for r in requests] == [1, 2, 3]
    assert [r.emitted[0] for r in requests[1:]] == [
        tuple(model.tokenizer.encode(texts[0])[: len(r.emitted[0])]) for r in requests[1:]
    ]
    assert {r.sampling.seed for r in requests} == {5}


async def test_a_request_goes_to_the_gateway_that_keeps_its_longest_prefix(model, tmp_path):
    keys = {"alpha": b"ka", "beta": b"kb"}
    path = tmp_path / "keys"
    path.write_text("".join(f"{t}: {sha256(k).hexdigest()}\n" for t, k in keys.items()))
    options = FrontDoorOptions(api_keys_file=str(path))
    gateways = [FakeGateway(saying(model, "a b c")) for _ in range(3)]
    prompt = list(range(40))
    for gateway, length in ((gateways[1], 16), (gateways[2], 32)):
        gateway.kept_prefixes = {prefix_digest("alpha", prompt[:length]): length}
    async with front_door(*gateways, model=model, options=options) as site:
        sessions = site.door._parts.pool._sessions
        await until(lambda: sum(bool(s._prefixes) for s in sessions.values()) == 2)

        async def ask(key, *tokens):
            request = GENERATE(token_ids={"ids": tokens})
            await all_of(
                site.inference.Generate(request, metadata=[("x-api-key", key)], timeout=WAIT_S)
            )

        await ask("ka", *prompt)
        await ask("ka", *prompt[:20], 99)
        await ask("kb", *prompt)  # another tenant: its prompts are its own
        gateways[2].kept_prefixes = {}
        await until(lambda: sum(bool(s._prefixes) for s in sessions.values()) == 1)
        await ask("ka", *prompt)
    found = [[r.cache_salt for r in g.submitted if r.cache_salt == "alpha"] for g in gateways]
    assert found == [[], ["alpha", "alpha"], ["alpha"]]
    (others,) = [r.prefix for g in gateways for r in g.submitted if r.cache_salt == "beta"]
    assert others is None


async def test_a_request_waits_for_a_gateway_up_to_its_bound(model):
    options = FrontDoorOptions(gateway_wait_s=0.2)
    async with front_door(model=model, options=options) as site:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "no gateway could take the request within 0.2 s" in failure.value.details()
        assert site.door.stats().in_flight == 0


async def test_a_request_that_came_before_any_gateway_is_served(model):
    async with front_door(model=model) as site:
        task = asyncio.create_task(
            all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
        )
        await until(lambda: site.door.stats().in_flight == 1)
        await site.add_gateway(FakeGateway(saying(model, GREETING)))
        assert text_of((await task)[1]) == GREETING


async def test_load_is_spread_and_a_draining_gateway_gets_no_new_work(model):
    gateways = [FakeGateway(saying(model, GREETING), hold_after=1) for _ in range(2)]
    async with front_door(*gateways, model=model) as site:
        tasks = [
            asyncio.create_task(all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S)))
            for _ in range(6)
        ]
        await until(lambda: [g.num_running for g in gateways] == [3, 3])
        site.set_state(0, MemberState.DRAINING)
        tasks += [
            asyncio.create_task(all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S)))
            for _ in range(2)
        ]
        await until(lambda: [g.num_running for g in gateways] == [3, 5])
        for gateway in gateways:
            gateway.go_on()
        for task in tasks:
            assert text_of((await task)[1]) == GREETING
        assert gateways[0].aborted == []


async def test_a_front_door_sees_what_another_one_has_sent(model):
    gateways = [FakeGateway(saying(model, GREETING), hold_after=1) for _ in range(2)]
    async with front_door(*gateways, model=model) as site:
        other = await site.add_door()
        site.set_state(0, MemberState.DRAINING)

        def asked(stub, count):
            return [
                asyncio.create_task(all_of(stub.Generate(GENERATE(text="x"), timeout=WAIT_S)))
                for _ in range(count)
            ]

        tasks = asked(site.inference, 4)
        await until(lambda: gateways[1].num_running == 4)
        site.set_state(0, MemberState.ACTIVE)
        pool = other.door._parts.pool
        (busy,) = (s for m, s in pool._sessions.items() if m.name == "gateway-1")
        await until(lambda: busy.outstanding_tokens > 0)
        tasks += asked(other.inference, 2)
        await until(lambda: gateways[0].num_running == 2)
        for gateway in gateways:
            gateway.go_on()
        for task in tasks:
            assert text_of((await task)[1]) == GREETING


@pytest.mark.parametrize("is_full", [False, True])
async def test_a_stream_goes_to_the_holder_of_its_snapshot_if_there_is_room(model, is_full):
    first, holder, other = gateways = [
        FakeGateway(saying(model, GREETING), hold_after=4, max_requests=n) for n in (9, 1, 9)
    ]
    async with front_door(*gateways, model=model) as site:
        pool = site.door._parts.pool
        _, at_holder, _ = pool._sessions.values()

        def asked(name):
            call = site.inference.Generate(GENERATE(request_id=name, text="x"), timeout=WAIT_S)
            return asyncio.create_task(all_of(call))

        async def only(number, gateway, name):
            for i in range(3):
                site.set_state(i, MemberState.ACTIVE if i == number else MemberState.DRAINING)
            task = asked(name)
            await until(lambda: gateway.num_running == 1 and gateway.is_held)
            return task

        tasks = [await only(0, first, "a")]
        tasks += [await only(1, holder, "b")] if is_full else []
        for i in range(3):
            site.set_state(i, MemberState.ACTIVE)
        (submitted,) = first.submitted
        stamp = Stamp(
            request_id=submitted.request_id,
            sequence_index=0,
            assignment=submitted.assignment,
            position=2,
            weights_version="weights-1",
            tokens=b"",
        )
        site.endpoints[0].report(stamp, str(at_holder.member.id))
        await asyncio.sleep(0.1)  # the snapshot's place is told, and the loads
        await site.kill_gateway(0)
        taker = other if is_full else holder
        await until(lambda: any(r.request_id == submitted.request_id for r in taker.submitted))
        assert taker.submitted[0].snapshots[0].holder == str(at_holder.member.id)
        for gateway in gateways:
            gateway.go_on()
        for task in tasks:
            assert text_of((await task)[1]) == GREETING


async def test_a_gateway_that_leaves_the_view_gives_its_requests_to_others(model):
    gateways = [FakeGateway(saying(model, GREETING), hold_after=n) for n in (3, None)]
    async with front_door(gateways[0], model=model) as site:
        task = asyncio.create_task(
            all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
        )
        await until(lambda: gateways[0].num_running == 1)
        await site.add_gateway(gateways[1])
        site.set_state(0, MemberState.GONE)
        assert text_of((await task)[1]) == GREETING
        await until(lambda: gateways[0].num_running == 0)


async def test_a_gateway_that_refuses_for_it_drains_is_passed_by(model):
    gateways = [FakeGateway(saying(model, GREETING)) for _ in range(2)]
    gateways[0].is_draining = True  # its own word comes before the View's
    async with front_door(*gateways, model=model) as site:
        for _ in range(3):
            _, responses = await all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
            assert text_of(responses) == GREETING
    assert gateways[0].submitted == []


async def test_an_admitted_request_is_not_refused_by_full_gateways(model):
    small = FakeGateway(saying(model, GREETING), hold_after=1, max_requests=1)
    first = FakeGateway(saying(model, GREETING), hold_after=2)
    async with front_door(first, model=model) as site:
        moved = asyncio.create_task(
            all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
        )
        await until(lambda: first.num_running == 1)
        await site.add_gateway(small)
        blocking = asyncio.create_task(
            all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
        )
        await until(lambda: small.num_running == 1)
        await site.kill_gateway(0)
        await asyncio.sleep(0.2)  # it is refused several times
        small.go_on()
        for task in (moved, blocking):
            assert text_of((await task)[1]) == GREETING


async def test_a_client_resumes_where_its_stream_broke(model):
    gateway = FakeGateway(saying(model, GREETING))
    tokens = [*model.tokenizer.encode(GREETING), model.eos_token_ids[0]]
    async with front_door(gateway, model=model) as site:
        for has in (1, 3, len(tokens) - 1):
            request = GENERATE(text="x", resume_from=[{"token_ids": tokens[:has]}])
            _, responses = await all_of(site.inference.Generate(request, timeout=WAIT_S))
            assert responses[0].first_token_index == has
            assert [t for r in responses for t in r.token_ids] == tokens[has:]
            had = model.tokenizer.decode(tokens[:has])
            assert had + text_of(responses) == GREETING
            assert responses[-1].finish.usage.completion_tokens == len(tokens)
    assert [len(r.emitted[0]) for r in gateway.submitted] == [1, 3, len(tokens) - 1]


async def test_a_client_that_missed_only_the_end_gets_it_without_a_gateway(model):
    tokens = list(model.tokenizer.encode(GREETING))
    async with front_door(model=model) as site:

        async def end_of(token_ids, **stopping):
            request = GENERATE(text="x", resume_from=[{"token_ids": token_ids}], stopping=stopping)
            _, (end,) = await all_of(site.inference.Generate(request, timeout=WAIT_S))
            assert (end.text, list(end.token_ids)) == ("", [])
            assert end.first_token_index == len(token_ids)
            return end.finish

        ended = await end_of([*tokens, model.eos_token_ids[0]])
        assert ended.stop_token_id == model.eos_token_ids[0]
        full = await end_of(tokens, max_tokens=len(tokens))
        assert full.reason == inference_pb2.FINISH_REASON_LENGTH
        stopped = await end_of(tokens, stop_strings=["lazy dog"])
        assert stopped.stop_string == "lazy dog"


async def test_a_chat_resumes_in_the_state_in_which_it_broke(model):
    call = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    reply = f"I think.\n</think>\n\nFirst.\n\n{call}\n{call}"
    tokens = [*model.tokenizer.encode(reply), model.eos_token_ids[0]]
    chat = {
        "request_id": "c",
        "messages": [{"role": "user", "content": "go"}],
        "tools": [{"name": "f", "parameters": '{"properties": {"a": {"type": "integer"}}}'}],
    }
    async with front_door(FakeGateway(saying(model, reply)), model=model) as site:

        async def parts_from(has):
            resume = [{"token_ids": tokens[:has]}]
            request = inference_pb2.ChatRequest(**chat, resume_from=resume)
            _, responses = await all_of(site.inference.Chat(request, timeout=WAIT_S))
            return responses

        whole = await parts_from(0)
        for has in range(0, len(tokens) - 1, 7):
            rest = await parts_from(has)
            assert [r.SerializeToString() for r in rest] == [
                r.SerializeToString() for r in whole[has:]
            ]
    calls = [c for r in whole for c in r.tool_calls]
    assert [(c.id, c.arguments) for c in calls] == [
        ("call_c_0_0", '{"a": 1}'),
        ("call_c_0_1", '{"a": 1}'),
    ]


class RudeGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """Speaks the protocol as it should not: old assignments, repeats, and gaps."""

    def __init__(self, tokens):
        self._tokens = tokens
        self.submits = []

    async def Session(self, request_iterator, context):
        yield gateway_pb2.SessionResponse(stats={})
        async for command in request_iterator:
            if command.WhichOneof("command") != "submit":
                continue
            submit = command.submit
            self.submits.append(submit)
            has = len(submit.emitted[0].ids) if submit.emitted else 0

            def event(start, end, submit=submit, **fields):
                return gateway_pb2.TokenEvent(
                    **{
                        "request_id": submit.request_id,
                        "assignment": submit.assignment,
                        "first_token_index": start,
                        "token_ids": self._tokens[start:end],
                        **fields,
                    }
                )

            events = [
                event(has, has + 2, assignment=submit.assignment - 1),
                event(has, has + 2, request_id="nobody's"),
                event(has, has + 2),
                event(has, has + 3),
                event(0, has + 1),
            ]
            if len(self.submits) == 1:
                events.append(event(has + 4, has + 5))  # a gap: asked for again
            elif len(self.submits) == 2:
                events.append(event(has + 3, has + 3, finish=gateway_pb2.EVENT_FINISH_CANCELLED))
            else:
                events.append(
                    event(has + 2, len(self._tokens), finish=gateway_pb2.EVENT_FINISH_LENGTH)
                )
            yield gateway_pb2.SessionResponse(events={"events": events})


async def test_old_assignments_repeats_and_gaps_never_reach_the_client(model):
    tokens = list(model.tokenizer.encode(GREETING * 2))
    rude = RudeGateway(tokens)
    server = grpc.aio.server()
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(rude, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with front_door(model=model) as site:
        await site.add_gateway(FakeGateway(saying(model, "")), publish=False)
        site.members[0] = type(site.members[0])(
            id=site.members[0].id,
            role=site.members[0].role,
            state=MemberState.ACTIVE,
            endpoint=f"127.0.0.1:{port}",
        )
        site.publish()
        _, responses = await all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
        await site.door.close()
    await server.stop(None)
    assert tokens_of(responses) == tokens
    assert [len(s.emitted[0].ids) if s.emitted else 0 for s in rude.submits] == [0, 3, 6]


async def test_a_newer_session_of_a_front_door_ends_its_older_one(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=1)
    async with front_door(gateway, model=model) as site:
        task = asyncio.create_task(
            all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
        )
        await until(lambda: gateway.num_running == 1)
        async with grpc.aio.insecure_channel(site.members[0].endpoint) as channel:
            call = gateway_pb2_grpc.GatewayServiceStub(channel).Session()
            hello = gateway_pb2.Hello(front_door=FrontDoorOptions().name)
            await call.write(gateway_pb2.SessionRequest(hello=hello))
            await until(lambda: gateway.aborted)
            call.cancel()
        gateway.go_on()  # the first one has opened its stream again, and asks again
        assert text_of((await task)[1]) == GREETING


async def test_a_gateway_whose_engine_has_stopped_ends_its_streams(model):
    gateways = [FakeGateway(saying(model, GREETING), hold_after=n) for n in (1, None)]
    async with front_door(gateways[0], model=model) as site:
        task = asyncio.create_task(
            all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
        )
        await until(lambda: gateways[0].num_running == 1)
        await site.add_gateway(gateways[1])
        gateways[0].failure = "a sibling rank has died"
        assert text_of((await task)[1]) == GREETING


async def test_a_request_at_which_the_gateway_fails_is_an_internal_error(model):
    def broken(request, index):
        raise AssertionError(index)

    gateway = FakeGateway(saying(model, GREETING))
    gateway.submit = broken  # type: ignore[method-assign]
    async with front_door(gateway, model=model) as site:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await all_of(site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S))
    assert failure.value.code() is grpc.StatusCode.INTERNAL
