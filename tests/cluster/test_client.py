"""The client library against real front doors whose connections break: every token once."""

import asyncio
import hashlib
import random
from contextlib import AsyncExitStack

import grpc
import pytest

from cluster.chaos.cable import Cable
from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.pb.expertmesh.v1 import inference_pb2
from expertmesh_client import (
    AsyncClient,
    Client,
    FinishReason,
    Message,
    RetryPolicy,
    Sampling,
    Stopping,
    Tool,
    ToolCall,
)
from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as own
from tests.cluster.harness_frontdoor import DEMO, WAIT_S, front_door, saying, until
from tests.cluster.harness_proxy import cutting_proxy
from tests.fakes import FakeGateway

# Characters of one to four bytes, and words of several tokens.
TEXT = "Fünf große Füchse sprängen über den faulen Hund — 日本語のテキスト 🦊🐕 "
TEXTS = (
    TEXT * 3,
    "sphinx of black quartz judge my vow 🏴\u200d☠️ " * 4,
)
CALL = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
SPOKEN = f"I think, 🦊 and so on.\n\nStill.\n</think>\n\nFirst, ünd\n\n{CALL}\n{CALL}"
TOOLS = [Tool("f", "adds", {"properties": {"a": {"type": "integer"}}})]
QUICK = RetryPolicy(first_backoff_s=0.005, max_backoff_s=0.05)
SEED = 20_26
LONG_S = 60.0
SILENCE_S = 20.0  # the client gives a silent peer up after 15
ROUNDS = 6


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    return ModelInfo.load(DEMO, name="demo")


def tokens_of(model, text):
    return (*model.tokenizer.encode(text), model.eos_token_ids[0])


def drawn(low, high, seed=SEED):
    chance = random.Random(seed)
    return lambda: chance.randint(low, high)


def is_in_order(updates):
    """Say whether each sequence's tokens come without gap or repeat."""
    counts = {}
    for update in updates:
        if update.first_token_index != counts.get(update.sequence_index, 0):
            return False
        counts[update.sequence_index] = update.first_token_index + len(update.token_ids)
    return True


async def test_a_stream_that_is_cut_50_times_brings_every_token_once(model):
    gateway = FakeGateway(saying(model, *TEXTS))
    seeds = {}
    async with (
        front_door(gateway, model=model) as site,
        cutting_proxy(site.address, drawn(100, 4000)) as (proxy, address),
        AsyncClient(address, retry=QUICK, seed=SEED) as client,
    ):
        while proxy.num_cuts < 50:
            stream = client.generate("x", sampling=Sampling(num_sequences=2), timeout_s=LONG_S)
            updates = [update async for update in stream]
            answer = await stream.collect()
            seeds[answer.request_id] = answer.seed

            assert is_in_order(updates)
            assert [c.token_ids for c in answer.completions] == [tokens_of(model, t) for t in TEXTS]
            assert [c.text for c in answer.completions] == list(TEXTS)
            assert [c.finish.reason for c in answer.completions] == [FinishReason.STOP] * 2
        await until(lambda: site.door.stats().in_flight == 0)
    resumed = [r for r in gateway.submitted if any(r.emitted)]
    assert len(resumed) >= 10
    assert {r.sampling.seed == seeds[r.request_id] for r in resumed} == {True}


async def test_a_chat_of_a_program_without_an_event_loop_survives_as_well(model):
    async with (
        front_door(FakeGateway(saying(model, SPOKEN)), model=model) as site,
        cutting_proxy(site.address, drawn(100, 3000)) as (proxy, address),
    ):

        def talk():
            answers = []
            with Client(address, retry=QUICK, seed=SEED) as client:
                while proxy.num_cuts < 15:
                    turns = [Message("user", "go")]
                    with client.chat(
                        turns, tools=TOOLS, request_id="c", timeout_s=LONG_S
                    ) as stream:
                        assert is_in_order(list(stream))
                        answers.append(stream.collect())
            return answers

        answers = await asyncio.to_thread(talk)
    calls = (ToolCall("call_c_0_0", "f", '{"a": 1}'), ToolCall("call_c_0_1", "f", '{"a": 1}'))
    for answer in answers:
        assert answer.completions[0].token_ids == tokens_of(model, SPOKEN)
        assert answer.finish.reason is FinishReason.TOOL_CALLS
        assert answer.message == Message(
            "assistant", "First, ünd", "I think, 🦊 and so on.\n\nStill.", calls
        )


async def test_requests_at_several_front_doors_outlive_them(model):
    """Front doors stop and come back in turn while 8 streams run through both."""
    async with AsyncExitStack() as stack:
        gateways = [FakeGateway(saying(model, *TEXTS)) for _ in range(2)]
        doors = [await stack.enter_async_context(front_door(g, model=model)) for g in gateways]
        proxies = [await stack.enter_async_context(cutting_proxy(d.address)) for d in doors]
        client = await stack.enter_async_context(
            AsyncClient([address for _, address in proxies], retry=QUICK, seed=SEED)
        )

        async def ask():
            stream = client.generate("x", sampling=Sampling(num_sequences=2), timeout_s=LONG_S)
            return await stream.collect()

        answers = []

        async def keep_asking():
            while number < ROUNDS:
                answers.append(await ask())

        number = 0
        tasks = [asyncio.create_task(keep_asking()) for _ in range(8)]
        while number < ROUNDS:
            await until(lambda: all(door.door.stats().in_flight > 0 for door in doors))
            proxy, _ = proxies[number % 2]
            await doors[number % 2].door.close()
            stats = doors[1 - number % 2].door.stats
            await until(lambda stats=stats: stats().in_flight == 8)  # all have gone over
            doors[number % 2] = await stack.enter_async_context(
                front_door(FakeGateway(saying(model, *TEXTS)), model=model)
            )
            proxy.upstream = doors[number % 2].address
            number += 1
        await asyncio.gather(*tasks)
    assert len(answers) >= 8
    for answer in answers:
        assert [c.token_ids for c in answer.completions] == [tokens_of(model, t) for t in TEXTS]
        assert [c.text for c in answer.completions] == list(TEXTS)


async def test_a_front_door_that_drains_sends_new_requests_to_another(model):
    gateways = [FakeGateway(saying(model, TEXTS[0])) for _ in range(2)]
    async with (
        front_door(gateways[0], model=model) as first,
        front_door(gateways[1], model=model) as second,
        AsyncClient([first.address, second.address], retry=QUICK) as client,
    ):
        first.door._parts.admission.is_draining = True
        for _ in range(4):
            answer = await client.generate("x", timeout_s=WAIT_S).collect()
            assert answer.text == TEXTS[0]
    assert gateways[0].submitted == []


async def test_a_held_stream_goes_on_after_its_connection_was_cut_in_the_middle(model, tmp_path):
    gateway = FakeGateway(saying(model, TEXTS[0]), hold_after=7)
    keys = tmp_path / "keys"
    keys.write_text(f"t: {hashlib.sha256(b'k').hexdigest()}\n")
    options = FrontDoorOptions(api_keys_file=str(keys))
    async with (
        front_door(gateway, model=model, options=options) as site,
        cutting_proxy(site.address) as (proxy, address),
        AsyncClient(address, api_key="k", retry=QUICK) as client,
    ):
        stream = client.generate("x", request_id="mine", timeout_s=WAIT_S)
        updates = [await anext(stream) for _ in range(7)]
        proxy.cut()
        gateway.go_on()
        updates += [update async for update in stream]

        assert is_in_order(updates)
        assert "".join(u.text for u in updates) == TEXTS[0]
    assert [len(r.emitted[0]) if r.emitted else 0 for r in gateway.submitted] == [0, 7]
    assert {r.request_id for r in gateway.submitted} == {"t/mine"}


@pytest.mark.parametrize("tokens_per_step", [1, 3])
async def test_a_stream_resumed_at_any_message_says_what_the_whole_would_have(
    model, tokens_per_step
):
    """Half characters, half stop strings, reasoning and half tool calls are where they were."""
    generate = {
        "text": "x",
        "stopping": {"stop_strings": ["Hund — 日本語?", "テキスト🦊", "🐕 Fünf"]},
    }
    chat = {
        "messages": [{"role": "user", "content": "go"}],
        "tools": [{"name": "f", "parameters": '{"properties": {"a": {"type": "integer"}}}'}],
    }
    for kind, text, fields in (("Generate", TEXT, generate), ("Chat", SPOKEN, chat)):
        gateway = FakeGateway(saying(model, text), tokens_per_step=tokens_per_step)
        async with front_door(gateway, model=model) as site:
            message = getattr(inference_pb2, f"{kind}Request")

            async def answered(resume_from, kind=kind, message=message, site=site, fields=fields):
                request = message(request_id="c", resume_from=resume_from, **fields)
                call = getattr(site.inference, kind)(request, timeout=WAIT_S)
                _, *rest = [response async for response in call]
                return rest

            whole = await answered([])
            token_ids = []
            for number, response in enumerate(whole[:-1], 1):
                token_ids += response.token_ids
                assert await answered([{"token_ids": token_ids}]) == whole[number:]


async def test_a_peer_that_falls_silent_is_given_up_in_time(model):
    """Also while a ping of gRPC's own is under way, which it would wait a minute for."""
    gateway = FakeGateway(saying(model, TEXTS[0]), hold_after=3)
    async with front_door(gateway, model=model) as site:
        cable = Cable(site.address)
        async with AsyncClient(await cable.lay(), retry=QUICK) as client:
            stream = client.generate("x", timeout_s=LONG_S)
            for _ in range(3):
                await anext(stream)
            assert cable.silence() == 1
            gateway.go_on()
            async with asyncio.timeout(SILENCE_S):
                answer = await stream.collect()
        await cable.close()

    assert answer.text == TEXTS[0]


async def test_a_request_is_taken_from_a_connection_that_only_the_front_door_believes_in(model):
    gateway = FakeGateway(saying(model, TEXTS[0]), hold_after=0)
    async with (
        front_door(gateway, model=model) as site,
        cutting_proxy(None) as (proxy, address),
        AsyncClient(address, retry=QUICK) as client,
    ):
        lost = site.inference.Generate(
            inference_pb2.GenerateRequest(request_id="mine", text="x"), timeout=WAIT_S
        )
        await lost.read()
        stream = client.generate("x", request_id="mine", timeout_s=WAIT_S)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)  # there is nobody at first, as where a connection was lost
        proxy.upstream = site.address
        await until(lambda: len(gateway.submitted) == 2)
        gateway.go_on()
        answer = (await first, await stream.collect())[1]

        assert answer.text == TEXTS[0]
        assert await lost.code() is grpc.StatusCode.ALREADY_EXISTS


def test_messages_of_client_and_server_do_not_get_in_each_others_way():
    assert own.GenerateRequest is not inference_pb2.GenerateRequest
    assert own.DESCRIPTOR.serialized_pb == inference_pb2.DESCRIPTOR.serialized_pb
    assert own.DESCRIPTOR.pool is not inference_pb2.DESCRIPTOR.pool


async def test_a_stop_string_that_is_cut_in_half_still_ends_the_stream(model):
    end = "faulen Hund — 日本語"
    async with (
        front_door(FakeGateway(saying(model, TEXTS[0])), model=model) as site,
        cutting_proxy(site.address, drawn(100, 1500)) as (proxy, address),
        AsyncClient(address, retry=QUICK, seed=SEED) as client,
    ):
        while proxy.num_cuts < 5:
            stopping = Stopping(stop_strings=[end])
            answer = await client.generate("x", stopping=stopping, timeout_s=LONG_S).collect()

            assert answer.text == TEXTS[0].partition(end)[0]
            assert answer.finish.stop_string == end
