"""The front door over real gRPC: streams, finishes, chat, cancellation, health, drain."""

import asyncio
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.frontdoor.metrics import NoMetrics
from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.pb.expertmesh.v1 import cluster_pb2, inference_pb2
from tests.cluster.harness_frontdoor import DEMO, WAIT_S, front_door, saying, until
from tests.fakes import FakeGateway
from workers.placement import MemberState

INFERENCE = "expertmesh.v1.InferenceService"
GREETING = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    return ModelInfo.load(DEMO, name="demo")


async def all_of(call):
    """Return the first message and the others."""
    first, *others = [response async for response in call]
    return first, others


async def rest_of(call):
    """Return what is still to come of a call that was read from."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def text_of(responses, sequence_index=0) -> str:
    return "".join(r.text for r in responses if r.sequence_index == sequence_index)


def tokens_of(responses, sequence_index=0) -> list[int]:
    """Return a sequence's tokens; fails when an index is missing or comes twice."""
    token_ids: list[int] = []
    for response in responses:
        if response.sequence_index == sequence_index:
            assert response.first_token_index == len(token_ids)
            token_ids.extend(response.token_ids)
    return token_ids


async def test_a_prompt_is_continued_token_by_token(model):
    async with front_door(FakeGateway(saying(model, GREETING)), model=model) as site:
        request = inference_pb2.GenerateRequest(
            request_id="a", text="Once", output={"logprobs": 2, "prompt_logprobs": 0}
        )
        first, responses = await all_of(site.inference.Generate(request, timeout=WAIT_S))
    assert (first.request_id, first.HasField("seed"), list(first.token_ids)) == ("a", True, [])
    expected = [*model.tokenizer.encode(GREETING), model.eos_token_ids[0]]
    assert tokens_of(responses) == expected
    assert text_of(responses) == GREETING
    assert all(len(r.logprobs[0].top) == 2 for r in responses)
    prompt = responses[0].prompt_logprobs
    assert len(prompt) == len(model.tokenizer.encode("Once"))
    assert [p.HasField("logprob") for p in prompt[:2]] == [False, True][: len(prompt)]
    finish = responses[-1].finish
    assert finish.reason == inference_pb2.FINISH_REASON_STOP
    assert finish.stop_token_id == model.eos_token_ids[0]
    assert finish.usage.prompt_tokens == len(model.tokenizer.encode("Once"))
    assert finish.usage.completion_tokens == len(expected)
    assert finish.usage.cached_tokens == 1


async def test_a_given_seed_is_kept_and_ids_are_drawn_when_none_are_given(model):
    gateway = FakeGateway(saying(model, "ok"))
    async with front_door(gateway, model=model) as site:
        request = inference_pb2.GenerateRequest(text="x", sampling={"seed": 2**64 - 1})
        first, _ = await all_of(site.inference.Generate(request, timeout=WAIT_S))
        second, _ = await all_of(site.inference.Generate(request, timeout=WAIT_S))
    assert first.seed == second.seed == 2**64 - 1
    assert first.request_id != second.request_id
    assert [r.sampling.seed for r in gateway.submitted] == [2**64 - 1] * 2


async def test_max_tokens_ends_a_sequence_with_length_and_whole_characters(model):
    reply = "🫠" * 10
    num_tokens = len(model.tokenizer.encode(reply)) // 2 + 1
    async with front_door(FakeGateway(saying(model, reply)), model=model) as site:
        request = inference_pb2.GenerateRequest(text="x", stopping={"max_tokens": num_tokens})
        _, responses = await all_of(site.inference.Generate(request, timeout=WAIT_S))
    assert len(tokens_of(responses)) == num_tokens
    assert responses[-1].finish.reason == inference_pb2.FINISH_REASON_LENGTH
    assert set(text_of(responses)) == {"🫠"}


@pytest.mark.parametrize("tokens_per_step", [1, 4, 100])
async def test_a_stop_string_ends_the_text_before_it_and_frees_the_gateway(model, tokens_per_step):
    reply = f"{GREETING} and then {GREETING} again"
    gateway = FakeGateway(saying(model, reply), tokens_per_step=tokens_per_step, hold_after=14)
    if tokens_per_step == 100:
        gateway.go_on()
    async with front_door(gateway, model=model) as site:
        request = inference_pb2.GenerateRequest(
            text="x", stopping={"stop_strings": ["lazy cat", " fox j", "quick blue"]}
        )
        _, responses = await all_of(site.inference.Generate(request, timeout=WAIT_S))
        await until(lambda: gateway.num_running == 0)
    assert text_of(responses) == "the quick brown"
    finish = responses[-1].finish
    assert finish.reason == inference_pb2.FINISH_REASON_STOP
    assert finish.stop_string == " fox j"
    assert finish.usage.completion_tokens == len(tokens_of(responses))


async def test_several_sequences_are_streamed_side_by_side(model):
    texts = ("one", GREETING, "three and more")
    async with front_door(FakeGateway(saying(model, *texts)), model=model) as site:
        request = inference_pb2.GenerateRequest(
            text="x", sampling={"num_sequences": 3}, stopping={"stop_strings": ["fox"]}
        )
        _, responses = await all_of(site.inference.Generate(request, timeout=WAIT_S))
    assert [text_of(responses, i) for i in range(3)] == ["one", "the quick brown ", texts[2]]
    assert sum(r.HasField("finish") for r in responses) == 3


async def test_token_ids_are_a_prompt_as_they_stand(model):
    gateway = FakeGateway(saying(model, "ok"))
    async with front_door(gateway, model=model) as site:
        request = inference_pb2.GenerateRequest(token_ids={"ids": [5, 6, 7]})
        await all_of(site.inference.Generate(request, timeout=WAIT_S))
    assert gateway.submitted[0].prompt_token_ids == (5, 6, 7)
    assert gateway.submitted[0].stopping.max_tokens == model.context_tokens - 3


TOOL = {
    "name": "get_weather",
    "parameters": '{"type": "object", "properties": {"days": {"type": "integer"}}}',
}
CALLING = (
    "I need the weather.\n</think>\n\nOne moment.\n\n<tool_call>\n<function=get_weather>\n"
    "<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n"
    "</tool_call>"
)


async def test_chat_tells_reasoning_content_and_tool_calls_apart(model):
    gateway = FakeGateway(saying(model, CALLING))
    async with front_door(gateway, model=model) as site:
        request = inference_pb2.ChatRequest(
            request_id="c", messages=[{"role": "user", "content": "Rome?"}], tools=[TOOL]
        )
        _, responses = await all_of(site.inference.Chat(request, timeout=WAIT_S))
        again, _ = await all_of(site.inference.Chat(request, timeout=WAIT_S))
    assert again.request_id == "c"
    assert "".join(r.reasoning for r in responses) == "I need the weather."
    assert "".join(r.content for r in responses) == "One moment."
    (call,) = [call for r in responses for call in r.tool_calls]
    assert (call.id, call.name) == ("call_c_0_0", "get_weather")
    assert json.loads(call.arguments) == {"city": "Rome", "days": 2}
    assert responses[-1].finish.reason == inference_pb2.FINISH_REASON_TOOL_CALLS
    assert tokens_of(responses) == [*model.tokenizer.encode(CALLING), model.eos_token_ids[0]]
    prompt = model.tokenizer.decode(gateway.submitted[0].prompt_token_ids)
    assert "get_weather" in prompt
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")


async def test_chat_without_thinking_answers_at_once(model):
    gateway = FakeGateway(saying(model, "Rome it is."))
    async with front_door(gateway, model=model) as site:
        request = inference_pb2.ChatRequest(
            messages=[{"role": "user", "content": "Rome?"}], enable_thinking=False
        )
        _, responses = await all_of(site.inference.Chat(request, timeout=WAIT_S))
    assert "".join(r.content for r in responses) == "Rome it is."
    assert not any(r.reasoning for r in responses)
    assert responses[-1].finish.reason == inference_pb2.FINISH_REASON_STOP


async def test_tokenize_detokenize_and_list_models(model):
    async with front_door(model=model) as site:
        text = "Grüße, 世界! <|im_end|>"
        tokens = await site.inference.Tokenize(inference_pb2.TokenizeRequest(text=text * 500))
        assert tuple(tokens.token_ids) == model.tokenizer.encode(text * 500)
        ids = model.tokenizer.encode(text)
        for skip, expected in ((False, text), (True, "Grüße, 世界! ")):
            request = inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip)
            assert (await site.inference.Detokenize(request)).text == expected
        models = (await site.inference.ListModels(inference_pb2.ListModelsRequest())).models
    assert [(m.name, m.vocabulary_size, m.has_chat_template) for m in models] == [
        ("demo", 4096, True)
    ]
    assert models[0].default_sampling.top_k == 20
    assert not models[0].default_sampling.HasField("seed")


async def test_a_client_that_goes_away_frees_its_sequences_at_once(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=2)
    async with front_door(gateway, model=model) as site:
        for _ in range(20):
            call = site.inference.Generate(inference_pb2.GenerateRequest(text="x"))
            async for response in call:
                if response.token_ids:
                    break
            call.cancel()
            await until(lambda: gateway.num_running == 0)
        await until(lambda: site.door.stats().in_flight == 0)
    assert len(gateway.aborted) == 20


async def test_a_deadline_frees_its_sequences(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=2)
    async with front_door(gateway, model=model) as site:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await all_of(
                site.inference.Generate(inference_pb2.GenerateRequest(text="x"), timeout=0.3)
            )
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: gateway.num_running == 0 and site.door.stats().in_flight == 0)


async def test_cancel_ends_the_stream_of_another_call(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=2)
    async with front_door(gateway, model=model) as site:
        request = inference_pb2.GenerateRequest(
            request_id="a", text="x", sampling={"num_sequences": 2}
        )
        call = site.inference.Generate(request, timeout=WAIT_S)
        await call.read()
        await until(lambda: gateway.num_running == 1)
        await site.inference.Cancel(inference_pb2.CancelRequest(request_id="a"))
        responses = await rest_of(call)
        ends = [r.finish.reason for r in responses if r.HasField("finish")]
        assert ends == [inference_pb2.FINISH_REASON_CANCELLED] * 2
        await until(lambda: gateway.num_running == 0)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await site.inference.Cancel(inference_pb2.CancelRequest(request_id="a"))
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_cancel_also_ends_a_request_that_waits_for_a_gateway(model):
    async with front_door(model=model) as site:
        request = inference_pb2.GenerateRequest(request_id="a", text="x")
        call = site.inference.Generate(request, timeout=WAIT_S)
        await call.read()
        await site.inference.Cancel(inference_pb2.CancelRequest(request_id="a"))
        (response,) = await rest_of(call)
        assert response.finish.reason == inference_pb2.FINISH_REASON_CANCELLED


async def test_health_follows_gateways_and_coverage(model):
    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    async with front_door(model=model) as site:
        health = health_pb2_grpc.HealthStub(site.channel)

        async def becomes(status, service=""):
            call = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
            async for response in call:
                if response.status == status:
                    break
            call.cancel()

        await becomes(not_serving)
        await site.add_gateway(FakeGateway(saying(model, "ok")))
        await becomes(serving)
        await becomes(serving, INFERENCE)
        site.covered = False
        site.publish()
        await becomes(not_serving, INFERENCE)
        site.covered = True
        site.publish()
        await becomes(serving)
        site.set_state(0, MemberState.DRAINING)
        await becomes(not_serving)
        site.set_state(0, MemberState.ACTIVE)
        await becomes(serving)
        await site.kill_gateway(0)
        await becomes(not_serving)
        await becomes(serving, "expertmesh.v1.ClusterService")


async def test_reflection_names_every_service_and_buf_curl_can_call_them(model):
    async with front_door(FakeGateway(saying(model, "ok")), model=model) as site:

        async def buf_curl(*arguments):
            process = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).with_name("buf")),
                *("curl", "--protocol", "grpc", "--http2-prior-knowledge"),
                *arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            out, err = await asyncio.wait_for(process.communicate(), 60.0)
            assert process.returncode == 0, err.decode()
            return out.decode()

        listed = await buf_curl("--list-methods", f"http://{site.address}")
        for method in ("Generate", "Chat", "Tokenize", "Detokenize", "ListModels", "Cancel"):
            assert f"{INFERENCE}/{method}" in listed
        assert "expertmesh.v1.ClusterService/WatchView" in listed
        assert "GatewayService" not in listed
        out = await buf_curl("-d", '{"text": "x"}', f"http://{site.address}/{INFERENCE}/Generate")
        assert "FINISH_REASON_STOP" in out


async def test_draining_lets_running_streams_finish_and_refuses_new_work(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=2)
    async with front_door(gateway, model=model) as site:
        call = site.inference.Generate(inference_pb2.GenerateRequest(text="x"), timeout=WAIT_S)
        await call.read()
        draining = asyncio.create_task(site.door.drain(WAIT_S))
        await until(lambda: not site.door.ready)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await all_of(site.inference.Generate(inference_pb2.GenerateRequest(text="x")))
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "draining" in failure.value.details()
        gateway.go_on()
        assert text_of(await rest_of(call)) == GREETING
        assert await draining


async def test_a_drain_ends_by_its_deadline(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=2)
    async with front_door(gateway, model=model) as site:
        call = site.inference.Generate(inference_pb2.GenerateRequest(text="x"), timeout=WAIT_S)
        await call.read()
        assert not await site.door.drain(0.05)
        with pytest.raises(grpc.aio.AioRpcError):
            await rest_of(call)
        await until(lambda: gateway.num_running == 0)


async def test_clients_see_the_view_with_members_coverage_and_load(model):
    async with front_door(model=model) as site:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await site.cluster.GetView(cluster_pb2.GetViewRequest())
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        watch = site.cluster.WatchView(cluster_pb2.WatchViewRequest(), timeout=WAIT_S)
        await site.add_gateway(FakeGateway(saying(model, "ok")))
        assert (await watch.read()).view.version == 1
        await until(site.door._parts.pool.stats)
        view = (await site.cluster.GetView(cluster_pb2.GetViewRequest())).view
        assert (view.term, view.version, view.weights_version) == (1, 1, "weights-1")
        worker, gateway = view.members
        assert (worker.name, worker.incarnation, worker.pid) == ("expert-0", 1, 99)
        assert (worker.num_slots, worker.slots_used) == (2, 1)
        assert gateway.state == cluster_pb2.MEMBER_STATE_ACTIVE
        assert dict(gateway.gateway_stats.rows_by_worker) == {"expert-0.1": 7}
        assert (view.coverage.complete, view.coverage.num_experts) == (True, 1)
        site.covered = False
        site.publish()
        newer = (await watch.read()).view
        assert (newer.version, newer.coverage.complete) == (2, False)
        assert [(e.layer, e.expert) for e in newer.coverage.uncovered] == [(0, 0)]
        watch.cancel()


async def test_tenants_have_their_own_request_ids(model, tmp_path):
    keys = {name: hashlib.sha256(key).hexdigest() for name, key in (("a/b", b"ka"), ("a", b"kb"))}
    path = tmp_path / "keys"
    path.write_text("".join(f"{name}: {digest}\n" for name, digest in keys.items()))
    options = FrontDoorOptions(api_keys_file=str(path))
    gateway = FakeGateway(saying(model, GREETING), hold_after=1)
    async with front_door(gateway, model=model, options=options) as site:
        request = inference_pb2.GenerateRequest(request_id="same", text="x")
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await all_of(site.inference.Generate(request, timeout=WAIT_S))
        assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED
        keys = [(("x-api-key", "ka"),), (("authorization", "Bearer kb"),)]
        calls = [site.inference.Generate(request, metadata=key, timeout=WAIT_S) for key in keys]
        firsts = [await call.read() for call in calls]
        assert [first.request_id for first in firsts] == ["same", "same"]
        await until(lambda: gateway.num_running == 2)
        cancel = inference_pb2.CancelRequest(request_id="same")
        await site.inference.Cancel(cancel, metadata=keys[0])
        assert (await rest_of(calls[0]))[-1].finish.reason == (
            inference_pb2.FINISH_REASON_CANCELLED
        )
        gateway.go_on()
        assert text_of(await rest_of(calls[1])) == GREETING


class Recorder(NoMetrics):
    def __init__(self):
        self.firsts, self.gaps, self.num_tokens, self.codes, self.loads = [], [], 0, [], []
        self.prompt_tokens = 0

    def load_changed(self, in_flight, waiting):
        self.loads.append((in_flight, waiting))

    def request_admitted(self, prompt_tokens):
        self.prompt_tokens += prompt_tokens

    def first_token(self, seconds):
        self.firsts.append(seconds)

    def tokens(self, count, gap_s):
        self.num_tokens += count
        self.gaps.append(gap_s)

    def request_ended(self, method, code):
        self.codes.append((method, code))


async def test_metrics_see_every_request_token_and_status(model):
    metrics = Recorder()
    gateway = FakeGateway(saying(model, "a b c"))
    async with front_door(gateway, model=model, metrics=metrics) as site:
        request = inference_pb2.GenerateRequest(text="x y")
        _, responses = await all_of(site.inference.Generate(request, timeout=WAIT_S))
        with pytest.raises(grpc.aio.AioRpcError):
            await all_of(site.inference.Generate(inference_pb2.GenerateRequest()))
    assert metrics.codes == [("Generate", "OK"), ("Generate", "INVALID_ARGUMENT")]
    assert metrics.num_tokens == len(tokens_of(responses))
    assert metrics.prompt_tokens == len(model.tokenizer.encode("x y"))
    assert len(metrics.firsts) == 1
    assert metrics.gaps[0] is None
    assert all(gap >= 0 for gap in metrics.gaps[1:])
    assert metrics.loads == [(1, 1), (1, 0), (0, 0)]


def test_a_front_door_needs_neither_torch_nor_transformers():
    code = (
        "import sys, cluster.frontdoor.server, cluster.endpoint;"
        "print([m for m in ('torch', 'transformers', 'ray', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
