"""Public protobuf <-> the words of the data plane, and exceptions to gRPC statuses."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message as ProtobufMessage
from google.rpc import error_details_pb2, status_pb2

from cluster import wire
from cluster.frontdoor.admission import Job
from cluster.frontdoor.model import ModelInfo
from cluster.pb.expertmesh.v1 import inference_pb2
from workers.errors import (
    DrainingError,
    DuplicateRequestError,
    ExpertmeshError,
    FieldViolation,
    InvalidRequestError,
    IsolatedError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RefusedError,
    StaleAssignmentError,
    UnauthenticatedError,
    UnavailableError,
)
from workers.types import Request, Sampling, Stopping

AnyRequest = inference_pb2.GenerateRequest | inference_pb2.ChatRequest

_STATUS_DETAILS = "grpc-status-details-bin"
_STATUSES: Sequence[tuple[type[ExpertmeshError], grpc.StatusCode]] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (DuplicateRequestError, grpc.StatusCode.ALREADY_EXISTS),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DrainingError, grpc.StatusCode.UNAVAILABLE),
    (IsolatedError, grpc.StatusCode.UNAVAILABLE),
    (StaleAssignmentError, grpc.StatusCode.ABORTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (RefusedError, grpc.StatusCode.FAILED_PRECONDITION),
)
_ROLES = ("system", "user", "assistant", "tool")


def code_of(error: Exception) -> grpc.StatusCode:
    """Return the gRPC status of an error; INTERNAL for one that has none of its own."""
    return next((code for kind, code in _STATUSES if isinstance(error, kind)), _INTERNAL)


_INTERNAL = grpc.StatusCode.INTERNAL


def status_details(error: Exception) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata that carries a google.rpc.Status with the error's details."""
    details: list[ProtobufMessage] = []
    if isinstance(error, InvalidRequestError):
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=v.field, description=v.description
                    )
                    for v in error.violations
                ]
            )
        )
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    number, _ = code_of(error).value
    status = status_pb2.Status(code=number, message=str(error))
    for detail in details:
        status.details.add().Pack(detail)
    return ((_STATUS_DETAILS, status.SerializeToString()),)


def job_of(
    message: AnyRequest,
    prompt_token_ids: Sequence[int],
    model: ModelInfo,
    *,
    request_id: str,
    seed: int,
    default_max_tokens: int,
    max_sequences: int,
    cache_salt: str = "",
) -> Job:
    """Return a request in full, completed from the model's defaults; its rules are not checked.

    Raises:
        InvalidRequestError: `resume_from` does not fit `num_sequences`.
    """
    num_sequences = (
        message.sampling.num_sequences if message.sampling.HasField("num_sequences") else 1
    )
    left = model.context_tokens - len(prompt_token_ids)
    stopping = message.stopping
    return Job(
        request=Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=_sampling_of(message.sampling, model.sampling, seed),
            stopping=Stopping(
                max_tokens=stopping.max_tokens
                if stopping.HasField("max_tokens")
                else max(1, min(left, default_max_tokens), stopping.min_tokens),
                min_tokens=stopping.min_tokens,
                stop_token_ids=tuple(stopping.stop_token_ids),
                eos_token_ids=model.eos_token_ids,
                ignore_eos=stopping.ignore_eos,
            ),
            output=wire.output_of(message.output),
            num_sequences=num_sequences,
            emitted=_emitted_of(message.resume_from, min(num_sequences, max_sequences)),
            resume_window_s=message.resume_window_s,
            cache_salt=cache_salt,
        ),
        stop_strings=tuple(stopping.stop_strings),
        is_named=bool(message.request_id),
        takes_over=is_resumed(message),
        prompt_field=_prompt_field(message),
    )


def _prompt_field(message: AnyRequest) -> str:
    if isinstance(message, inference_pb2.ChatRequest):
        return "messages"
    return {"token_ids": "token_ids.ids"}.get(message.WhichOneof("prompt") or "", "text")


def _sampling_of(message: inference_pb2.Sampling, default: Sampling, seed: int) -> Sampling:
    """Return sampling whose unset fields are the model's."""

    def chosen(field: str) -> Any:  # noqa: ANN401  # a field's own type
        return getattr(message if message.HasField(field) else default, field)  # type: ignore[arg-type]

    return Sampling(
        temperature=chosen("temperature"),
        top_p=chosen("top_p"),
        top_k=chosen("top_k"),
        min_p=chosen("min_p"),
        presence_penalty=chosen("presence_penalty"),
        frequency_penalty=chosen("frequency_penalty"),
        repetition_penalty=chosen("repetition_penalty"),
        seed=message.seed if message.HasField("seed") else seed,
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


def is_resumed(message: AnyRequest) -> bool:
    """Whether its client has lost a stream of it, and so has heard that it was admitted."""
    return bool(message.resume_from)


def _emitted_of(
    points: Iterable[inference_pb2.ResumePoint], num_sequences: int
) -> tuple[tuple[int, ...], ...]:
    """Return what the client has of each sequence; empty when it has nothing."""
    emitted: dict[int, tuple[int, ...]] = {}
    for i, point in enumerate(points):
        field = f"resume_from[{i}].sequence_index"
        if point.sequence_index >= num_sequences:
            raise InvalidRequestError(
                FieldViolation(
                    field, f"{point.sequence_index} is not one of {num_sequences} sequences"
                )
            )
        if point.sequence_index in emitted:
            raise InvalidRequestError(FieldViolation(field, "names a sequence a second time"))
        emitted[point.sequence_index] = tuple(point.token_ids)
    if not any(emitted.values()):
        return ()
    return tuple(emitted.get(index, ()) for index in range(num_sequences))


def tools_of(message: inference_pb2.ChatRequest) -> list[dict[str, Any]]:
    """Return the tools in the OpenAI form that chat templates write out.

    Raises:
        InvalidRequestError: A tool has no name, or its parameters are not a JSON object.
    """
    tools = []
    for i, tool in enumerate(message.tools):
        if not tool.name:
            raise InvalidRequestError(FieldViolation(f"tools[{i}].name", "must not be empty"))
        function: dict[str, Any] = {"name": tool.name}
        if tool.description:
            function["description"] = tool.description
        if tool.parameters:
            function["parameters"] = _json_object(tool.parameters, f"tools[{i}].parameters")
        tools.append({"type": "function", "function": function})
    return tools


def messages_of(message: inference_pb2.ChatRequest) -> list[dict[str, Any]]:
    """Return the conversation in the Hugging Face form that chat templates read.

    Raises:
        InvalidRequestError: A role is unknown, or a call's arguments are not a JSON object.
    """
    return [_message_of(turn, f"messages[{i}]") for i, turn in enumerate(message.messages)]


def _message_of(turn: inference_pb2.Message, path: str) -> dict[str, Any]:
    if turn.role not in _ROLES:
        raise InvalidRequestError(
            FieldViolation(f"{path}.role", f"must be one of {', '.join(_ROLES)}, not {turn.role!r}")
        )
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.HasField("reasoning"):
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.name,
                    "arguments": _json_object(
                        call.arguments or "{}", f"{path}.tool_calls[{i}].arguments"
                    ),
                },
            }
            for i, call in enumerate(turn.tool_calls)
        ]
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # escapes may hide half a character
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(FieldViolation(field, f"is not JSON: {error}")) from error
    if not isinstance(value, dict):
        raise InvalidRequestError(FieldViolation(field, "must be a JSON object"))
    return value


def schemas_of(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the argument schema of each tool by name."""
    return {t["function"]["name"]: t["function"].get("parameters", {}) for t in tools}


def model_message(model: ModelInfo) -> inference_pb2.Model:
    """Return a model as ListModels shows it."""
    sampling = wire.sampling_message(model.sampling, 1)
    sampling.ClearField("seed")  # drawn for each request
    return inference_pb2.Model(
        name=model.name,
        context_tokens=model.context_tokens,
        vocabulary_size=model.vocab_size,
        default_sampling=sampling,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=model.template is not None,
    )
