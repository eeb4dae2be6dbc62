"""Messages to words and back, and errors to statuses."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster import wire
from cluster.frontdoor import translate
from cluster.frontdoor.model import ModelInfo
from cluster.pb.expertmesh.v1 import gateway_pb2, inference_pb2
from tests.unit.harness_published import DEMO
from workers import errors
from workers.types import (
    FinishReason,
    GatewayStats,
    Output,
    Request,
    Sampling,
    Stopping,
    TokenEvent,
    TokenLogprob,
)

SAMPLING = Sampling(
    temperature=0.7,
    top_p=0.8,
    top_k=20,
    min_p=0.05,
    presence_penalty=1.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.1,
    seed=2**63 + 1,
    logit_bias=((3, -1.5), (9, 2.0)),
)


@pytest.fixture(scope="module")
def model():
    return ModelInfo.load(DEMO, name="demo")


def job_of(message, model, num_prompt_tokens=4):
    return translate.job_of(
        message,
        range(num_prompt_tokens),
        model,
        request_id="r",
        seed=77,
        default_max_tokens=100,
        max_sequences=16,
    )


@pytest.mark.parametrize(
    "request_",
    [
        Request(
            request_id="a",
            prompt_token_ids=(1, 2),
            sampling=Sampling(),
            stopping=Stopping(max_tokens=1),
        ),
        Request(
            request_id="b",
            prompt_token_ids=(5,) * 9,
            sampling=SAMPLING,
            stopping=Stopping(
                max_tokens=9,
                min_tokens=2,
                stop_token_ids=(4,),
                eos_token_ids=(2, 0),
                ignore_eos=True,
            ),
            output=Output(logprobs=0, prompt_logprobs=5),
            num_sequences=2,
            assignment=3,
            emitted=((1, 2), ()),
            cache_salt="tenant",
        ),
    ],
)
def test_a_request_reaches_the_gateway_as_it_was(request_):
    message = gateway_pb2.Submit.FromString(wire.submit_message(request_).SerializeToString())
    assert wire.request_of(message) == request_


@pytest.mark.parametrize(
    "event",
    [
        TokenEvent(
            request_id="a", sequence_index=0, assignment=1, first_token_index=0, token_ids=(0,)
        ),
        TokenEvent(
            request_id="b",
            sequence_index=3,
            assignment=2,
            first_token_index=7,
            token_ids=(1, 2),
            logprobs=(TokenLogprob(1, -0.5, ((1, -0.5), (4, -2.0))), TokenLogprob(2, 0.0)),
            prompt_logprobs=(None, TokenLogprob(8, -0.25)),
            finish=FinishReason.STOP,
            stop_token_id=0,
            cached_tokens=5,
            error="why",
        ),
    ],
)
def test_an_event_reaches_the_front_door_as_it_was(event):
    message = gateway_pb2.TokenEvent.FromString(wire.event_message(event).SerializeToString())
    assert wire.event_of(message) == event


def test_a_front_door_knows_the_prefixes_that_a_gateway_keeps():
    known: dict[int, int] = {}
    reported: dict[int, int] = {}
    for kept in ({1: 16, 2**64 - 1: 32}, {1: 16, 5: 48}, {5: 49}, {}):
        message = wire.prefixes_message(reported, kept)
        assert message is not None
        wire.update_prefixes(known, gateway_pb2.Prefixes.FromString(message.SerializeToString()))
        reported = kept
        assert known == kept
    assert wire.prefixes_message(reported, {}) is None


def test_statistics_reach_the_front_door_as_they_were():
    stats = GatewayStats(
        running=1, steps=9, parked_s=0.5, recoveries=(0, 2, 1), rows_by_worker={"expert-0.1": 12}
    )
    assert wire.stats_of(wire.stats_message(stats)) == stats


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError(
            errors.FieldViolation("a", "b"), errors.FieldViolation("c", "d")
        ),
        errors.DuplicateRequestError("twice"),
        errors.OverloadedError("full", 2.5),
        errors.DrainingError("closing"),
        errors.ExpertmeshError("broken"),
    ],
)
def test_a_refusal_reaches_the_front_door_as_it_was(error):
    refusal = wire.error_of(wire.refusal_message("r", 1, error))
    assert type(refusal) is type(error)
    assert str(refusal) == str(error)
    assert vars(refusal) == vars(error)


def test_unset_fields_are_the_checkpoints_and_the_server_draws_the_seed(model):
    job = job_of(inference_pb2.GenerateRequest(), model)
    assert job.request.sampling == Sampling(temperature=0.6, top_p=0.95, top_k=20, seed=77)
    assert job.request.stopping == Stopping(max_tokens=100, eos_token_ids=model.eos_token_ids)
    assert (job.request.num_sequences, job.request.emitted) == (1, ())
    assert job.request.output == Output()


def test_set_fields_are_the_clients_also_when_they_are_zero(model):
    sampling = wire.sampling_message(SAMPLING, 3)
    message = inference_pb2.GenerateRequest(sampling=sampling, output={"logprobs": 0})
    job = job_of(message, model)
    assert job.request.sampling == SAMPLING
    assert job.request.num_sequences == 3
    assert job.request.output == Output(logprobs=0)
    greedy = inference_pb2.GenerateRequest(sampling={"temperature": 0.0, "top_k": 0, "seed": 0})
    sampling = job_of(greedy, model).request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.0, 0, 0)


def test_unset_max_tokens_is_what_the_context_allows_up_to_the_bound(model):
    left = 30
    message = inference_pb2.GenerateRequest()
    job = job_of(message, model, num_prompt_tokens=model.context_tokens - left)
    assert job.request.stopping.max_tokens == left


def test_resume_points_are_sorted_by_sequence(model):
    message = inference_pb2.GenerateRequest(
        sampling={"num_sequences": 3},
        resume_from=[{"sequence_index": 2, "token_ids": [5]}, {"sequence_index": 0}],
    )
    job = job_of(message, model)
    assert job.request.emitted == ((), (), (5,))
    assert job.is_resumed


def test_no_more_sequences_are_laid_out_than_a_request_may_have(model):
    sampling = inference_pb2.Sampling(num_sequences=2**32 - 1)
    point = inference_pb2.ResumePoint(token_ids=[5])
    job = job_of(inference_pb2.GenerateRequest(sampling=sampling, resume_from=[point]), model)
    assert (job.request.num_sequences, len(job.request.emitted)) == (2**32 - 1, 16)


@pytest.mark.parametrize(
    "points", [[{"sequence_index": 1}], [{"token_ids": [1]}, {"token_ids": [2]}]]
)
def test_resume_points_must_fit_the_sequences(model, points):
    with pytest.raises(errors.InvalidRequestError, match=r"resume_from\[\d\]\.sequence_index"):
        job_of(inference_pb2.GenerateRequest(resume_from=points), model)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("messages[1].role", {"messages": [{"role": "user"}, {"role": "robot"}]}),
        *(
            (
                "messages[0].tool_calls[1].arguments",
                {
                    "messages": [
                        {
                            "role": "assistant",
                            "tool_calls": [{"name": "a"}, {"name": "b", "arguments": arguments}],
                        }
                    ]
                },
            )
            for arguments in ("{", "[1]", '"text"', '{"a": "\\ud800"}', "[" * 100_000)
        ),
    ],
)
def test_a_bad_conversation_is_refused_with_the_path_of_the_field(field, request_):
    with pytest.raises(errors.InvalidRequestError) as refusal:
        translate.messages_of(inference_pb2.ChatRequest(**request_))
    assert refusal.value.violations[0].field == field


@pytest.mark.parametrize(
    ("field", "tool"),
    [
        ("tools[0].name", {}),
        ("tools[0].parameters", {"name": "a", "parameters": "nonsense"}),
        ("tools[0].parameters", {"name": "a", "parameters": "[]"}),
    ],
)
def test_a_bad_tool_is_refused_with_the_path_of_the_field(field, tool):
    with pytest.raises(errors.InvalidRequestError) as refusal:
        translate.tools_of(inference_pb2.ChatRequest(tools=[tool]))
    assert refusal.value.violations[0].field == field


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequestError(errors.FieldViolation("a", "b")), "INVALID_ARGUMENT"),
        (errors.NotFoundError("x"), "NOT_FOUND"),
        (errors.DuplicateRequestError("x"), "ALREADY_EXISTS"),
        (errors.OverloadedError("x", 1.5), "RESOURCE_EXHAUSTED"),
        (errors.DrainingError("x"), "UNAVAILABLE"),
        (errors.UnavailableError("x"), "UNAVAILABLE"),
        (errors.UnauthenticatedError("x"), "UNAUTHENTICATED"),
        (errors.RefusedError("x"), "FAILED_PRECONDITION"),
        (errors.ExpertmeshError("x"), "INTERNAL"),
        (ValueError("x"), "INTERNAL"),
    ],
)
def test_each_error_has_one_status_and_carries_its_details(error, code):
    assert translate.code_of(error) is grpc.StatusCode[code]
    ((key, value),) = translate.status_details(error)
    status = status_pb2.Status.FromString(value)
    assert key == "grpc-status-details-bin"
    assert (status.code, status.message) == (grpc.StatusCode[code].value[0], str(error))
    if code == "INVALID_ARGUMENT":
        bad = error_details_pb2.BadRequest()
        assert status.details[0].Unpack(bad)
        assert [(v.field, v.description) for v in bad.field_violations] == [("a", "b")]
    if code == "RESOURCE_EXHAUSTED":
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToNanoseconds() == 1_500_000_000
