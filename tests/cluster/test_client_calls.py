"""What the client library makes of errors, full queues, deadlines, keys and certificates."""

import asyncio
import contextlib
import hashlib
import re
import sys
from pathlib import Path

import grpc
import pytest
import trustme

from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.frontdoor.tls import TlsFiles
from expertmesh_client import (
    AsyncClient,
    Client,
    DeadlineError,
    DuplicateRequestError,
    ExpertmeshError,
    FinishReason,
    InvalidRequestError,
    NotFoundError,
    Output,
    OverloadedError,
    RetryPolicy,
    Sampling,
    Stopping,
    UnauthenticatedError,
    UnavailableError,
    tls_credentials,
)
from tests.cluster.harness_frontdoor import DEMO, WAIT_S, front_door, saying, until
from tests.cluster.harness_proxy import cutting_proxy
from tests.cluster.harness_scripted import ends, refuses, says, scripted_door
from tests.fakes import FakeGateway

CODE = grpc.StatusCode
GREETING = "the quick brown fox jumps over the lazy dog"
QUICK = RetryPolicy(first_backoff_s=0.005, max_backoff_s=0.02, max_failures=5)
README = Path(__file__).parents[2] / "clients" / "python" / "README.md"


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    return ModelInfo.load(DEMO, name="demo")


async def test_all_losses_of_a_connection_are_survived_and_the_request_is_sent_whole():
    script = [
        refuses(CODE.UNAVAILABLE),
        refuses(CODE.ALREADY_EXISTS),
        says(1, then=refuses(CODE.CANCELLED)),
        refuses(CODE.ALREADY_EXISTS),
        says(2, then=refuses(CODE.INTERNAL, "Received RST_STREAM with error code 2")),
        says(3, then=ends),
        says(4, 5, then=refuses(CODE.UNKNOWN, "Stream removed")),
        says(6),
    ]
    async with (
        scripted_door(*script) as (door, address),
        AsyncClient(address, retry=QUICK) as client,
    ):
        options = {"stopping": Stopping(max_tokens=6), "request_id": "r", "timeout_s": WAIT_S}
        answer = await client.generate("x", **options).collect()

    assert answer.completions[0].token_ids == (1, 2, 3, 4, 5, 6)
    assert answer.text == "<1><2><3><4><5><6>"
    sent = [[list(p.token_ids) for p in r.resume_from] for r in door.requests]
    assert sent == [[], [], [[]], [[1]], [[1]], [[1, 2]], [[1, 2, 3]], [[1, 2, 3, 4, 5]]]
    assert {(r.request_id, r.text, r.stopping.max_tokens) for r in door.requests} == {("r", "x", 6)}
    assert [r.sampling.HasField("seed") for r in door.requests] == [False] * 3 + [True] * 5


async def test_a_program_without_an_event_loop_gets_the_same():
    script = [
        says(1, then=refuses(CODE.CANCELLED)),
        says(2, then=refuses(CODE.INTERNAL, "RST_STREAM")),
        says(3, then=ends),
        says(4),
    ]
    async with scripted_door(*script) as (_, address):

        def ask():
            with Client(address, retry=QUICK) as client:
                return client.generate("x", timeout_s=WAIT_S).collect()

        answer = await asyncio.to_thread(ask)
    assert answer.text == "<1><2><3><4>"


async def test_a_request_in_flight_elsewhere_is_no_loss_and_is_told():
    async with (
        scripted_door(refuses(CODE.ALREADY_EXISTS)) as (_, address),
        AsyncClient(address, retry=QUICK) as client,
    ):
        with pytest.raises(DuplicateRequestError):
            await client.generate("x", timeout_s=WAIT_S).collect()


async def test_errors_of_the_server_are_not_retried():
    internal = refuses(CODE.INTERNAL, "internal error: AssertionError")
    async with (
        scripted_door(says(1, then=internal)) as (door, address),
        AsyncClient(address, retry=QUICK) as client,
    ):
        with pytest.raises(ExpertmeshError, match="INTERNAL: internal error: AssertionError"):
            await (stream := client.generate("x", timeout_s=WAIT_S)).collect()
        with pytest.raises(RuntimeError, match="was closed, or has failed"):
            await stream.collect()
    assert len(door.requests) == 1


async def test_a_server_that_says_nothing_is_given_up_after_the_stated_bound():
    async def sleeps(request, context):
        await asyncio.sleep(WAIT_S)

    policy = RetryPolicy(first_backoff_s=0.005, max_backoff_s=0.02, stall_s=0.3)
    async with (
        scripted_door(says(1, then=sleeps), sleeps) as (door, address),
        AsyncClient(address, retry=policy) as client,
    ):
        stream = client.generate("x")
        assert (await anext(stream)).token_ids == (1,)
        with pytest.raises(DeadlineError, match=r"nothing new came for 0\.3 s"):
            await stream.collect()
    assert len(door.requests) == 2


async def test_pushback_is_heeded_by_those_who_wait_for_room():
    policy = RetryPolicy(waits_for_room=True)
    full = refuses(CODE.RESOURCE_EXHAUSTED, grpc_retry_pushback_ms="20")
    never = refuses(CODE.RESOURCE_EXHAUSTED, grpc_retry_pushback_ms="-1")
    async with (
        scripted_door(full, full, says(1), full, never) as (_, address),
        AsyncClient(address, retry=policy) as client,
    ):
        assert (await client.generate("x", timeout_s=WAIT_S).collect()).text == "<1>"
        with pytest.raises(OverloadedError):
            await client.generate("x", timeout_s=WAIT_S).collect()


async def test_a_full_queue_is_told_with_when_to_come_back_or_waited_for(model):
    options = FrontDoorOptions(max_requests=1, retry_after_s=0.05)
    gateway = FakeGateway(saying(model, GREETING), hold_after=1)
    async with front_door(gateway, model=model, options=options) as site:
        patience = RetryPolicy(waits_for_room=True)
        async with (
            AsyncClient(site.address) as hasty,
            AsyncClient(site.address, retry=patience) as patient,
        ):
            first = asyncio.create_task(hasty.generate("x", timeout_s=WAIT_S).collect())
            await until(lambda: gateway.is_held)
            with pytest.raises(OverloadedError) as full:
                await hasty.generate("x", timeout_s=WAIT_S).collect()
            assert full.value.retry_after_s == 0.05
            second = asyncio.create_task(patient.generate("x", timeout_s=WAIT_S).collect())
            await asyncio.sleep(0.1)
            gateway.go_on()
            assert {(await task).text for task in (first, second)} == {GREETING}


async def test_mistakes_are_told_field_by_field(model):
    async with (
        front_door(FakeGateway(saying(model, GREETING)), model=model) as site,
        AsyncClient(site.address) as client,
    ):
        with pytest.raises(InvalidRequestError) as wrong:
            await client.generate(
                "x", sampling=Sampling(temperature=-1, top_p=2), timeout_s=WAIT_S
            ).collect()
        assert [v.field for v in wrong.value.violations] == [
            "sampling.temperature",
            "sampling.top_p",
        ]
        with pytest.raises(NotFoundError, match="no-such"):
            await client.generate("x", model="no-such", timeout_s=WAIT_S).collect()
        with pytest.raises(InvalidRequestError, match="num_sequences"):
            await client.generate(
                "x", sampling=Sampling(num_sequences=0), timeout_s=WAIT_S
            ).collect()


async def test_what_is_asked_for_beside_tokens_comes_through(model):
    async with (
        front_door(FakeGateway(saying(model, GREETING)), model=model) as site,
        AsyncClient(site.address, model="demo") as client,
    ):
        (shown,) = await client.list_models()
        assert (shown.name, shown.has_chat_template) == ("demo", True)
        assert shown.default_sampling.seed is None
        prompt = await client.tokenize("a b c")
        assert await client.detokenize(prompt) == "a b c"
        output = Output(logprobs=2, prompt_logprobs=0)
        answer = await client.generate(prompt, output=output, timeout_s=WAIT_S).collect()

        assert [p.token_id for p in answer.completions[0].logprobs] == list(
            answer.completions[0].token_ids
        )
        assert answer.completions[0].logprobs[0].top[0][1] == -0.5
        assert [p.token_id for p in answer.prompt_logprobs[1:]] == list(prompt[1:])
        assert answer.finish.usage.prompt_tokens == len(prompt)
        assert answer.finish.stop_token_id == model.eos_token_ids[0]


async def test_keys_are_sent_and_strangers_are_told(model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"ann: {hashlib.sha256(b'key').hexdigest()}\n")
    options = FrontDoorOptions(api_keys_file=str(keys))
    async with front_door(
        FakeGateway(saying(model, GREETING)), model=model, options=options
    ) as site:
        async with AsyncClient(site.address, api_key="key") as client:
            assert (await client.generate("x", timeout_s=WAIT_S).collect()).text == GREETING
        for key in (None, "wrong"):
            async with AsyncClient(site.address, api_key=key) as client:
                with pytest.raises(UnauthenticatedError):
                    await client.tokenize("x")


async def test_nobody_there_is_told_after_the_bound_on_failures(unused_address):
    async with AsyncClient([unused_address] * 2, retry=QUICK) as client:
        with pytest.raises(UnavailableError, match="given up after 6 failures in a row"):
            await client.generate("x").collect()
        with pytest.raises(UnavailableError):
            await client.list_models()


@pytest.fixture
async def unused_address():
    async with cutting_proxy(None) as (_, address):
        yield address


async def test_a_deadline_is_for_the_whole_answer(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=2)
    async with (
        front_door(gateway, model=model) as site,
        AsyncClient(site.address) as client,
    ):
        stream = client.generate("x", timeout_s=0.5)
        with pytest.raises(DeadlineError):
            await stream.collect()
        await until(lambda: gateway.num_running == 0)


async def test_a_stream_that_is_closed_frees_its_request(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=2)
    async with (
        front_door(gateway, model=model) as site,
        AsyncClient(site.address) as client,
    ):
        async with client.generate("x", timeout_s=WAIT_S) as stream:
            await anext(stream)
        await until(lambda: gateway.num_running == 0)

        def leave_early():
            with Client(site.address) as client, client.generate("x", timeout_s=WAIT_S) as stream:
                next(stream)

        await asyncio.to_thread(leave_early)
        await until(lambda: gateway.num_running == 0)
        task = asyncio.create_task(client.generate("x", timeout_s=WAIT_S).collect())
        await until(lambda: gateway.is_held)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: gateway.num_running == 0)


async def test_a_request_is_cancelled_by_its_id_at_whatever_front_door_it_runs(model):
    gateways = [FakeGateway(saying(model, GREETING), hold_after=3) for _ in range(2)]
    async with (
        front_door(gateways[0], model=model) as first,
        front_door(gateways[1], model=model) as second,
        AsyncClient([first.address, second.address]) as client,
        AsyncClient([first.address, second.address]) as other,
    ):
        tasks = [
            asyncio.create_task(
                client.generate(
                    "x",
                    request_id=name,
                    sampling=Sampling(num_sequences=2),
                    timeout_s=WAIT_S,
                ).collect()
            )
            for name in "ab"
        ]
        await until(lambda: all(gateway.is_held for gateway in gateways))
        for name, task in zip("ab", tasks, strict=True):
            await other.cancel(name)
            answer = await task
            assert {c.finish.reason for c in answer.completions} == {FinishReason.CANCELLED}
            assert [len(c.token_ids) for c in answer.completions] == [3, 3]
        with pytest.raises(NotFoundError):
            await client.cancel("c")


async def test_a_cancelled_request_whose_stream_breaks_is_not_begun_anew(model):
    gateway = FakeGateway(saying(model, GREETING), hold_after=3)
    async with (
        front_door(gateway, model=model) as site,
        cutting_proxy(site.address) as (proxy, address),
        AsyncClient(address, retry=RetryPolicy(max_backoff_s=0.05, max_failures=1000)) as client,
    ):
        stream = client.generate("x", request_id="a", timeout_s=WAIT_S)
        for _ in range(3):
            await anext(stream)
        task = asyncio.create_task(stream.collect())
        proxy.upstream = None
        proxy.cut()
        await until(lambda: gateway.num_running == 0)
        proxy.upstream = site.address
        await client.cancel("a")  # it may just be on its way again
        answer = await task
    assert answer.finish.reason is FinishReason.CANCELLED
    assert len(answer.completions[0].token_ids) == 3


async def test_both_ends_prove_who_they_are_with_certificates(model, tmp_path):
    authority = trustme.CA()
    paths = {name: str(tmp_path / name) for name in ("ca", "own", "own_key", "front", "front_key")}
    authority.cert_pem.write_to_path(paths["ca"])
    for name, identity in (("own", "client@example"), ("front", "front.example")):
        issued = authority.issue_cert(identity)
        issued.cert_chain_pems[0].write_to_path(paths[name])
        issued.private_key_pem.write_to_path(paths[f"{name}_key"])
    tls = TlsFiles(paths["front"], paths["front_key"], paths["ca"])
    known = tls_credentials(ca_file=paths["ca"], cert_file=paths["own"], key_file=paths["own_key"])
    stranger = tls_credentials(ca_file=paths["ca"])
    gateway = FakeGateway(saying(model, GREETING))
    async with front_door(gateway, model=model, options=FrontDoorOptions(tls=tls)) as site:

        def connected(credentials):
            return AsyncClient(
                site.address, credentials=credentials, server_name="front.example", retry=QUICK
            )

        async with connected(known) as client:
            assert (await client.generate("x", timeout_s=WAIT_S).collect()).text == GREETING
        async with connected(stranger) as client:
            with pytest.raises(UnavailableError):
                await client.generate("x", timeout_s=WAIT_S).collect()
    with pytest.raises(ValueError, match="together"):
        tls_credentials(cert_file=paths["own"])


async def test_the_examples_of_the_readme_run(model, monkeypatch, tmp_path):
    call = (
        "</think>\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "</function>\n</tool_call>"
    )

    def reply(request, index):
        prompt = model.tokenizer.decode(request.prompt_token_ids)
        calls = "get_weather" in prompt and "tool_response" not in prompt
        text = call if calls else f"</think>\n\n{GREETING}"
        return (*model.tokenizer.encode(text), model.eos_token_ids[0])

    for name in ("ca.pem", "client.pem", "client.key"):
        (tmp_path / name).write_text("none that anybody connects with")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    async with front_door(FakeGateway(reply), model=model) as site:
        outputs = []
        for example in examples:
            program = example.replace("127.0.0.1:50051", site.address)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                program,
                env={"PYTHONPATH": str(README.parent / "src")},
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate()
            assert process.returncode == 0
            outputs.append(output.decode())
    assert len(examples) == 4
    assert [GREETING in output for output in outputs] == [True, True, True, False]
    assert all(len(example.splitlines()) <= 14 for example in examples)
