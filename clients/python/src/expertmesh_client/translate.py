"""The words of this package <-> protobuf, and gRPC errors to failures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from expertmesh_client._pb import details_pb2
from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as pb
from expertmesh_client.errors import Failure, FieldViolation
from expertmesh_client.types import (
    Finish,
    FinishReason,
    Message,
    Model,
    RequestOptions,
    Sampling,
    Stopping,
    TokenLogprob,
    Tool,
    ToolCall,
    Update,
    Usage,
)

Request = pb.GenerateRequest | pb.ChatRequest
Response = pb.GenerateResponse | pb.ChatResponse

_STATUS_DETAILS = "grpc-status-details-bin"
_PUSHBACK = "grpc-retry-pushback-ms"
_REASONS: Mapping[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}


def generate_request(prompt: str | Sequence[int], options: RequestOptions) -> pb.GenerateRequest:
    """Return the message that asks for a continuation."""
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    _complete(request, options)
    return request


def chat_request(
    messages: Iterable[Message],
    tools: Iterable[Tool],
    enable_thinking: bool | None,
    options: RequestOptions,
) -> pb.ChatRequest:
    """Return the message that asks for the next turn of a conversation."""
    request = pb.ChatRequest(
        messages=map(_message_message, messages),
        tools=map(_tool_message, tools),
        enable_thinking=enable_thinking,
    )
    _complete(request, options)
    return request


def _complete(request: Request, options: RequestOptions) -> None:
    """Write what both kinds of request have."""
    request.request_id = options.get("request_id") or ""
    request.model = options.get("model") or ""
    request.resume_window_s = options.get("resume_window_s", 0.0)
    sampling, stopping = options.get("sampling"), options.get("stopping")
    if sampling is not None:
        request.sampling.CopyFrom(_sampling_message(sampling))
    if stopping is not None:
        request.stopping.CopyFrom(_stopping_message(stopping))
    if (output := options.get("output")) is not None:
        request.output.CopyFrom(
            pb.Output(logprobs=output.logprobs, prompt_logprobs=output.prompt_logprobs)
        )


def _sampling_message(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        logit_bias=dict(sampling.logit_bias),
        num_sequences=sampling.num_sequences,
    )


def _stopping_message(stopping: Stopping) -> pb.Stopping:
    return pb.Stopping(
        max_tokens=stopping.max_tokens,
        min_tokens=stopping.min_tokens,
        stop_strings=stopping.stop_strings,
        stop_token_ids=stopping.stop_token_ids,
        ignore_eos=stopping.ignore_eos,
    )


def _message_message(message: Message) -> pb.Message:
    return pb.Message(
        role=message.role,
        content=message.content,
        reasoning=message.reasoning,
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
    )


def _tool_message(tool: Tool) -> pb.Tool:
    parameters = "" if tool.parameters is None else json.dumps(tool.parameters)
    return pb.Tool(name=tool.name, description=tool.description, parameters=parameters)


def update_of(response: Response) -> Update:
    """Return what a message of a stream says."""
    update = Update(
        sequence_index=response.sequence_index,
        first_token_index=response.first_token_index,
        token_ids=tuple(response.token_ids),
        logprobs=_logprobs_of(response.logprobs),
        prompt_logprobs=_logprobs_of(response.prompt_logprobs),
        finish=_finish_of(response.finish) if response.HasField("finish") else None,
    )
    if isinstance(response, pb.GenerateResponse):
        return replace(update, text=response.text)
    return replace(
        update,
        text=response.content,
        reasoning=response.reasoning,
        tool_calls=tuple(ToolCall(c.id, c.name, c.arguments) for c in response.tool_calls),
    )


def _logprobs_of(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            message.token_id,
            message.logprob if message.HasField("logprob") else None,
            tuple((top.token_id, top.logprob) for top in message.top),
        )
        for message in messages
    )


def _finish_of(message: pb.Finish) -> Finish:
    match = message.WhichOneof("stop_match")
    return Finish(
        reason=_REASONS.get(message.reason, FinishReason.UNKNOWN),
        stop_string=message.stop_string if match == "stop_string" else None,
        stop_token_id=message.stop_token_id if match == "stop_token_id" else None,
        usage=Usage(
            prompt_tokens=message.usage.prompt_tokens,
            completion_tokens=message.usage.completion_tokens,
            cached_tokens=message.usage.cached_tokens,
        ),
    )


def model_of(message: pb.Model) -> Model:
    """Return a model that is served."""
    sampling = message.default_sampling

    def chosen(field: str) -> Any:  # noqa: ANN401  # a field's own type
        return getattr(sampling, field) if sampling.HasField(field) else None  # type: ignore[arg-type]

    return Model(
        name=message.name,
        context_tokens=message.context_tokens,
        vocabulary_size=message.vocabulary_size,
        default_sampling=Sampling(
            temperature=chosen("temperature"),
            top_p=chosen("top_p"),
            top_k=chosen("top_k"),
            min_p=chosen("min_p"),
            presence_penalty=chosen("presence_penalty"),
            frequency_penalty=chosen("frequency_penalty"),
            repetition_penalty=chosen("repetition_penalty"),
            logit_bias=dict(sampling.logit_bias),
            num_sequences=chosen("num_sequences"),
        ),
        eos_token_ids=tuple(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
    )


def failure_of(error: grpc.RpcError) -> Failure:
    """Return how a call failed, with what its trailing metadata says about it."""
    pairs: Any = error.trailing_metadata() or ()  # grpc.aio has plain tuples
    metadata: dict[str, str | bytes] = dict(pairs)
    status = metadata.get(_STATUS_DETAILS, b"")
    violations, retry_after_s = _details_of(status if isinstance(status, bytes) else b"")
    pushback_ms = metadata.get(_PUSHBACK)
    if isinstance(pushback_ms, str) and pushback_ms.isdigit():
        retry_after_s = int(pushback_ms) / 1000
    elif pushback_ms is not None:  # a negative number, or none at all: not to be tried again
        retry_after_s = None
    return Failure(
        code=error.code(),
        message=error.details() or "",
        violations=violations,
        retry_after_s=retry_after_s,
    )


def _details_of(status: bytes) -> tuple[tuple[FieldViolation, ...], float | None]:
    """Return the field violations and the delay of a google.rpc.Status, where it has them."""
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    try:
        for detail in details_pb2.Status.FromString(status).details:
            match detail.type_url.rpartition("/")[2]:
                case "google.rpc.BadRequest":
                    violations += [
                        FieldViolation(v.field, v.description)
                        for v in details_pb2.BadRequest.FromString(detail.value).field_violations
                    ]
                case "google.rpc.RetryInfo":
                    delay = details_pb2.RetryInfo.FromString(detail.value).retry_delay
                    retry_after_s = max(0.0, delay.seconds + delay.nanos / 1e9)
                case _:
                    pass  # of no use here
    except DecodeError:  # a proxy's own; the status itself says enough
        return (), None
    return tuple(violations), retry_after_s
