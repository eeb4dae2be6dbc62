"""Every refused input over real gRPC: its status, its field, and a sentence that helps."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.pb.expertmesh.v1 import inference_pb2
from tests.cluster.harness_frontdoor import DEMO, WAIT_S, front_door, saying, until
from tests.cluster.test_frontdoor import rest_of
from tests.fakes import FakeGateway

GENERATE = inference_pb2.GenerateRequest
CHAT = inference_pb2.ChatRequest
USER = {"role": "user", "content": "hi"}
VOCABULARY = 4096
CONTEXT = 8192


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    return ModelInfo.load(DEMO, name="demo")


def sampling(**fields):
    return GENERATE(text="x", sampling=fields)


def stopping(**fields):
    return GENERATE(text="x", stopping=fields)


INVALID = [
    ("text", "must not be empty", GENERATE()),
    ("text", "must not be empty", GENERATE(text="")),
    ("token_ids.ids", "must not be empty", GENERATE(token_ids={})),
    ("token_ids.ids[1]", "out of range", GENERATE(token_ids={"ids": [1, VOCABULARY]})),
    ("token_ids.ids", "leaves room for", GENERATE(token_ids={"ids": [1] * CONTEXT})),
    ("stopping.max_tokens", f"at most {CONTEXT - 3}", GENERATE(
        token_ids={"ids": [1, 2, 3]}, stopping={"max_tokens": CONTEXT - 2}
    )),
    ("sampling.temperature", "from 0 up to 100", sampling(temperature=-1.0)),
    ("sampling.temperature", "nan", sampling(temperature=float("nan"))),
    ("sampling.top_p", "above 0 up to 1", sampling(top_p=0.0)),
    ("sampling.top_k", f"up to {VOCABULARY}", sampling(top_k=-1)),
    ("sampling.min_p", "from 0 up to 1", sampling(min_p=2.0)),
    ("sampling.presence_penalty", "from -2 up to 2", sampling(presence_penalty=3.0)),
    ("sampling.frequency_penalty", "from -2 up to 2", sampling(frequency_penalty=-3.0)),
    ("sampling.repetition_penalty", "from 0.01 up to 10", sampling(repetition_penalty=0.0)),
    (f"sampling.logit_bias[{VOCABULARY}]", "range", sampling(logit_bias={VOCABULARY: 1.0})),
    ("sampling.logit_bias[7]", "from -100 up to 100", sampling(logit_bias={7: 1000.0})),
    ("sampling.num_sequences", "from 1 up to 16", sampling(num_sequences=0)),
    ("stopping.max_tokens", "at least 1", stopping(max_tokens=0)),
    ("stopping.min_tokens", "at most max_tokens (2)", stopping(max_tokens=2, min_tokens=3)),
    ("stopping.stop_strings[0]", "1 to 256 characters", stopping(stop_strings=[""])),
    ("stopping.stop_token_ids[0]", "out of range", stopping(stop_token_ids=[VOCABULARY])),
    ("output.logprobs", "from 0 up to 20", GENERATE(text="x", output={"logprobs": 21})),
    ("output.prompt_logprobs", "20", GENERATE(text="x", output={"prompt_logprobs": 21})),
    ("request_id", "at most 128", GENERATE(text="x", request_id="i" * 129)),
    ("resume_window_s", "from 0", GENERATE(text="x", resume_window_s=-1)),
    ("resume_from[0].sequence_index", "not one of 1", GENERATE(
        text="x", resume_from=[{"sequence_index": 1, "token_ids": [1]}]
    )),
    ("messages", "must not be empty", CHAT()),
    ("messages", "the chat template refuses them", CHAT(
        messages=[USER, {"role": "system", "content": "late"}]
    )),
    ("messages[0].role", "must be one of system, user", CHAT(messages=[{"role": "bot"}])),
    ("messages[1].tool_calls[0].arguments", "is not JSON", CHAT(
        messages=[USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}]
    )),
    ("tools[0].parameters", "must be a JSON object", CHAT(
        messages=[USER], tools=[{"name": "a", "parameters": "[]"}]
    )),
    ("sampling.top_p", "above 0 up to 1", CHAT(messages=[USER], sampling={"top_p": 7.0})),
]  # fmt: skip


async def failure_of(call):
    """Return the error of a call, its status message and the unpacked details."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await (rest_of(call) if hasattr(call, "read") else call)
    metadata = dict(failure.value.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == failure.value.code().value[0]
    return failure.value, status


def method_of(site, request):
    return site.inference.Chat if isinstance(request, CHAT) else site.inference.Generate


async def test_wrong_fields_are_invalid_arguments_with_field_violations(model):
    gateway = FakeGateway(saying(model, "ok"))
    async with front_door(gateway, model=model) as site:
        for field, sentence, request in INVALID:
            error, status = await failure_of(method_of(site, request)(request, timeout=WAIT_S))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (field, error)
            bad = error_details_pb2.BadRequest()
            assert status.details[0].Unpack(bad)
            violations = [(v.field, v.description) for v in bad.field_violations]
            assert [f for f, _ in violations] == [field], violations
            assert sentence in violations[0][1]
            assert error.details() == f"{field}: {violations[0][1]}"
    assert gateway.submitted == []


async def test_other_refusals_have_their_own_status(model):
    async with front_door(FakeGateway(saying(model, "ok")), model=model) as site:
        inference = site.inference
        for call in (
            inference.Generate(GENERATE(text="x", model="gpt")),
            inference.Chat(CHAT(messages=[USER], model="gpt")),
            inference.Tokenize(inference_pb2.TokenizeRequest(text="x", model="gpt")),
            inference.Detokenize(inference_pb2.DetokenizeRequest(model="gpt")),
        ):
            error, _ = await failure_of(call)
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert error.details() == "model 'gpt' is not served here; 'demo' is"
        error, _ = await failure_of(
            inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[VOCABULARY]))
        )
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith("token_ids[0]: token id 4096 is out of range")


async def test_a_message_over_the_limit_is_refused_by_the_transport(model):
    options = FrontDoorOptions(max_message_bytes=10_000)
    async with front_door(FakeGateway(saying(model, "ok")), model=model, options=options) as site:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await site.inference.Tokenize(inference_pb2.TokenizeRequest(text="x" * 20_000))
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_id_in_flight_already_exists(model):
    gateway = FakeGateway(saying(model, "some words"), hold_after=1)
    async with front_door(gateway, model=model) as site:
        request = GENERATE(text="x", request_id="a")
        call = site.inference.Generate(request, timeout=WAIT_S)
        await call.read()
        error, _ = await failure_of(site.inference.Generate(request, timeout=WAIT_S))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        gateway.go_on()
        assert (await rest_of(call))[-1].HasField("finish")


async def test_a_full_queue_says_when_to_come_again(model):
    options = FrontDoorOptions(max_waiting=2, retry_after_s=1.5)
    gateway = FakeGateway(saying(model, "some words"), hold_after=0)
    async with front_door(gateway, model=model, options=options) as site:
        calls = [site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S) for _ in range(2)]
        for call in calls:
            await call.read()
        error, status = await failure_of(site.inference.Generate(GENERATE(text="x")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToNanoseconds() == 1_500_000_000
        resumed = GENERATE(text="x", resume_from=[{"token_ids": [5]}])
        calls.append(site.inference.Generate(resumed, timeout=WAIT_S))
        gateway.go_on()
        ends = await asyncio.gather(*(_last(call) for call in calls))
        assert all(end.HasField("finish") for end in ends)


async def test_full_gateways_refuse_new_requests_with_their_own_word(model):
    gateways = [FakeGateway(saying(model, "words"), hold_after=0, max_requests=1) for _ in range(2)]
    async with front_door(*gateways, model=model) as site:
        calls = [site.inference.Generate(GENERATE(text="x"), timeout=WAIT_S) for _ in range(2)]
        await until(lambda: all(g.num_running == 1 for g in gateways))
        error, status = await failure_of(site.inference.Generate(GENERATE(text="x")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToNanoseconds() == 2_500_000_000
        for gateway in gateways:
            gateway.go_on()
        assert all(end.HasField("finish") for end in [await _last(call) for call in calls])


async def _last(call):
    return (await rest_of(call))[-1]
