"""Token events to the messages that a client reads."""

from typing import Generic, TypeVar

from cluster import wire
from cluster.frontdoor.admission import Job
from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.parsers import Delta, OutputParser
from cluster.frontdoor.tokenizer import TextStream
from cluster.pb.expertmesh.v1 import inference_pb2
from workers.types import FinishReason, TokenEvent

Response = TypeVar("Response", inference_pb2.GenerateResponse, inference_pb2.ChatResponse)

_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
}


class Answer(Generic[Response]):
    """The answer to one request; keeps the text of each of its sequences.

    Args:
        job: The request.
        request_id: The id by which the client knows it.
        model: The served model.
    """

    _new: type[Response]

    def __init__(self, job: Job, request_id: str, model: ModelInfo) -> None:
        request = job.request
        self._request = request
        self._request_id = request_id
        self._texts = [
            TextStream(model.tokenizer, job.stop_strings, request.stopping.min_tokens)
            for _ in range(request.num_sequences)
        ]
        self._cached_tokens = [0] * request.num_sequences

    def first(self) -> Response:
        """Return the first message: the request id and the seed in use."""
        return self._new(request_id=self._request_id, seed=self._request.sampling.seed)

    def resume(self) -> list[Response]:
        """Go on behind the tokens that the client has; return the ends of complete sequences."""
        ends = []
        for index, token_ids in enumerate(self._request.emitted):
            piece = self._texts[index].push(token_ids)
            response = self._response(index, len(token_ids))
            if piece.stop_string is not None:
                self._finish(response, FinishReason.STOP, stop_string=piece.stop_string)
            elif self._ended_by(token_ids) is not None:
                self._finish(response, FinishReason.STOP, stop_token_id=token_ids[-1])
            elif len(token_ids) >= self._request.stopping.max_tokens:
                self._finish(response, FinishReason.LENGTH)
            # Text is made as in the first stream, and dropped: the client has it.
            self._add_text(response, piece.text, is_last=response.HasField("finish"))
            if response.HasField("finish"):
                end = self._response(index, len(token_ids))
                end.finish.CopyFrom(response.finish)
                ends.append(end)
        return ends

    def take(self, event: TokenEvent) -> Response:
        """Return the message for an event; `finish` is set when its sequence has ended."""
        index, text = event.sequence_index, self._texts[event.sequence_index]
        piece = text.push(event.token_ids, stop_token_id=event.stop_token_id)
        self._cached_tokens[index] = max(self._cached_tokens[index], event.cached_tokens)
        response = self._response(index, event.first_token_index)
        response.token_ids.extend(event.token_ids[: piece.num_tokens])
        response.logprobs.extend(wire.logprob_messages(event.logprobs[: piece.num_tokens]))
        response.prompt_logprobs.extend(wire.logprob_messages(event.prompt_logprobs))
        new_text = piece.text
        if piece.stop_string is not None:
            self._finish(response, FinishReason.STOP, stop_string=piece.stop_string)
        elif event.finish is not None:
            new_text += text.finish()
            self._finish(response, event.finish, stop_token_id=event.stop_token_id)
        self._add_text(response, new_text, is_last=response.HasField("finish"))
        return response

    def _add_text(self, response: Response, text: str, *, is_last: bool) -> None:
        """Put new text of a sequence where this kind of message has it."""
        raise AssertionError("each kind of answer has its own")

    def _response(self, index: int, first_token_index: int) -> Response:
        return self._new(
            request_id=self._request_id,
            sequence_index=index,
            first_token_index=first_token_index,
        )

    def _finish(
        self,
        response: Response,
        reason: FinishReason,
        *,
        stop_string: str | None = None,
        stop_token_id: int | None = None,
    ) -> None:
        index = response.sequence_index
        finish = response.finish
        finish.reason = _REASONS[reason]
        if stop_string is not None:
            finish.stop_string = stop_string
        elif stop_token_id is not None:
            finish.stop_token_id = stop_token_id
        finish.usage.prompt_tokens = len(self._request.prompt_token_ids)
        finish.usage.completion_tokens = self._texts[index].num_tokens
        finish.usage.cached_tokens = self._cached_tokens[index]

    def _ended_by(self, token_ids: tuple[int, ...]) -> int | None:
        """Return the token that ended a sequence, if one did."""
        stopping = self._request.stopping
        if len(token_ids) < max(1, stopping.min_tokens):
            return None
        return token_ids[-1] if token_ids[-1] in stopping.ending_ids else None


class GenerateAnswer(Answer[inference_pb2.GenerateResponse]):
    """An answer in plain text."""

    _new = inference_pb2.GenerateResponse

    def _add_text(
        self, response: inference_pb2.GenerateResponse, text: str, *, is_last: bool
    ) -> None:
        del is_last  # nothing more is held back
        response.text = text


class ChatAnswer(Answer[inference_pb2.ChatResponse]):
    """An answer in which reasoning, content and tool calls are told apart."""

    _new = inference_pb2.ChatResponse

    def __init__(
        self, job: Job, request_id: str, model: ModelInfo, parsers: list[OutputParser]
    ) -> None:
        super().__init__(job, request_id, model)
        self._parsers = parsers

    def _add_text(self, response: inference_pb2.ChatResponse, text: str, *, is_last: bool) -> None:
        parser = self._parsers[response.sequence_index]
        self._add(response, parser.push(text))
        if is_last:
            self._add(response, parser.finish())
            if parser.num_calls and response.finish.reason == inference_pb2.FINISH_REASON_STOP:
                response.finish.reason = inference_pb2.FINISH_REASON_TOOL_CALLS

    def _add(self, response: inference_pb2.ChatResponse, delta: Delta) -> None:
        response.reasoning += delta.reasoning
        response.content += delta.content
        parser = self._parsers[response.sequence_index]
        first = parser.num_calls - len(delta.tool_calls)
        for number, call in enumerate(delta.tool_calls, first):
            response.tool_calls.add(
                id=f"call_{self._request_id}_{response.sequence_index}_{number}",
                name=call.name,
                arguments=call.arguments,
            )
