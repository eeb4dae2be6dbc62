"""The client for programs without an event loop; it may be used from several threads."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Self, TypeAlias, TypeVar, Unpack

import grpc

from expertmesh_client import translate
from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as pb
from expertmesh_client._pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from expertmesh_client.calls import AnyJourney, Calls
from expertmesh_client.channel import (
    MAX_MESSAGE_BYTES,
    Targets,
    call_metadata,
    channel_options,
    targets_of,
)
from expertmesh_client.clock import now_s
from expertmesh_client.collect import Collector
from expertmesh_client.errors import ExpertmeshError
from expertmesh_client.journey import Attempt, BrokenStreamError
from expertmesh_client.retry import Retries, RetryPolicy
from expertmesh_client.types import Answer, Message, Model, RequestOptions, Tool, Update

_Asked = TypeVar("_Asked")
_Answered = TypeVar("_Answered")
_Call: TypeAlias = (  # grpc's classes take no parameters when run
    "grpc.CallIterator[pb.GenerateResponse] | grpc.CallIterator[pb.ChatResponse]"
)
_Send = Callable[[Attempt[pb.GenerateRequest] | Attempt[pb.ChatRequest]], _Call]


class Stream:
    """An answer as it comes: iterate over its updates, or let `collect` wait for all of it.

    A stream that is not read to its end is closed, by `close` or at the end of a `with`.
    """

    def __init__(self, journey: AnyJourney, send: _Send) -> None:
        self._journey = journey
        self._send = send
        self._collector = Collector(journey)
        self._updates = self._carry()

    @property
    def request_id(self) -> str:
        """The id under which the request is sent."""
        return self._journey.request_id

    @property
    def seed(self) -> int | None:
        """The seed in use; None until the server has told it."""
        return self._journey.seed

    def collect(self) -> Answer:
        """Wait for the rest, and return the whole answer, what was iterated over included.

        Raises:
            ExpertmeshError: It has failed.
            RuntimeError: It was closed, or has failed before.
        """
        for _ in self:
            pass
        return self._collector.answer()

    def close(self) -> None:
        """End the request, whatever is still to come of it."""
        self._updates.close()

    def __iter__(self) -> Iterator[Update]:
        return self

    def __next__(self) -> Update:
        update = next(self._updates)
        self._collector.add(update)
        return update

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _carry(self) -> Generator[Update, None, None]:
        """Send the request as often as it takes."""
        journey = self._journey
        while True:
            yield from journey.cancelled_rest()
            if journey.is_complete:
                return
            ended: grpc.RpcError | BrokenStreamError
            ended = BrokenStreamError("the stream ended before its sequences did")
            call = self._send(journey.begin(now_s()))
            try:
                for response in call:
                    update = journey.take(response, now_s())
                    if update is not None:
                        yield update
            except (grpc.RpcError, BrokenStreamError) as error:
                ended = error
            finally:
                call.cancel()  # type: ignore[no-untyped-call]
            if not journey.is_complete:
                time.sleep(journey.end(ended, now_s()))


class Client:
    """Calls the front doors of a cluster; whatever breaks on the way there is not the caller's.

    Args:
        target: HOST:PORT, or dns:///NAME:PORT for all addresses of a name; several of them are used
            in turn, and a request whose target fails goes on at the next one.
        api_key: Who calls; sent with every call. Use `credentials` too, or a trusted network.
        credentials: Makes the channels TLS; see `tls_credentials`.
        server_name: The name in the server's certificate, where it is not the target's.
        model: What is asked for where a call names no model; empty for the only one.
        retry: When, and how often, a call is sent again.
        max_message_bytes: The largest message that is sent or taken.
        seed: Fixes the jitter of retries and the order of targets.
    """

    def __init__(
        self,
        target: Targets,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
        model: str = "",
        retry: RetryPolicy | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        seed: int | None = None,
    ) -> None:
        targets = targets_of(target)
        options = channel_options(max_message_bytes, server_name)
        self._channels = ExitStack()
        self._stubs: list[InferenceServiceStub] = []
        for name in targets:
            if credentials is None:
                channel = grpc.insecure_channel(name, options)
            else:
                channel = grpc.secure_channel(name, credentials, options)
            self._stubs.append(InferenceServiceStub(self._channels.enter_context(channel)))
        self._metadata = call_metadata(api_key)
        self._calls = Calls(len(targets), retry or RetryPolicy(), model=model, seed=seed)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[RequestOptions]) -> Stream:
        """Continue a prompt, given as text or token ids; no chat template is applied."""
        return Stream(self._calls.generate(prompt, options), self._send)

    def chat(
        self,
        messages: Iterable[Message],
        *,
        tools: Iterable[Tool] = (),
        enable_thinking: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> Stream:
        """Answer a conversation, with reasoning, content and tool calls told apart.

        Args:
            messages: The turns so far.
            tools: What the model may call.
            enable_thinking: Whether it reasons first; None for what its template does.
            options: What any request may be given.
        """
        return Stream(self._calls.chat(messages, tools, enable_thinking, options), self._send)

    def tokenize(
        self, text: str, *, model: str | None = None, timeout_s: float = 30.0
    ) -> tuple[int, ...]:
        """Return the token ids of a text."""
        request = pb.TokenizeRequest(model=self._calls.model(model), text=text)
        response = self._ask(lambda stub: stub.Tokenize, request, self._calls.retries(timeout_s))
        return tuple(response.token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        model: str | None = None,
        timeout_s: float = 30.0,
    ) -> str:
        """Return the text of token ids."""
        request = pb.DetokenizeRequest(
            model=self._calls.model(model),
            token_ids=token_ids,
            skip_special_tokens=skip_special_tokens,
        )
        retries = self._calls.retries(timeout_s)
        return self._ask(lambda stub: stub.Detokenize, request, retries).text

    def list_models(self, *, timeout_s: float = 30.0) -> list[Model]:
        """Return what the cluster serves."""
        retries = self._calls.retries(timeout_s)
        response = self._ask(lambda stub: stub.ListModels, pb.ListModelsRequest(), retries)
        return list(map(translate.model_of, response.models))

    def cancel(self, request_id: str, *, timeout_s: float = 30.0) -> None:
        """End a request of this caller, wherever it was begun: its stream ends as CANCELLED.

        Every target is asked; behind one name with several addresses, only one of them.

        Raises:
            NotFoundError: It does not run there.
        """
        request = pb.CancelRequest(request_id=request_id)
        cancellation = self._calls.cancellation(request_id, timeout_s)
        while not cancellation.is_over:
            answer_s = cancellation.timeout_s(now_s())
            retries = self._calls.retries(answer_s, request_id, only_at=cancellation.target)
            try:
                self._ask(lambda stub: stub.Cancel, request, retries)
            except ExpertmeshError as error:
                time.sleep(cancellation.refused(error, now_s()))
            else:
                return

    def close(self) -> None:
        """Close the connections; streams that still run end."""
        self._channels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, attempt: Attempt[pb.GenerateRequest] | Attempt[pb.ChatRequest]) -> _Call:
        stub, request = self._stubs[attempt.target], attempt.request
        if isinstance(request, pb.ChatRequest):
            return stub.Chat(request, timeout=attempt.timeout_s, metadata=self._metadata)
        return stub.Generate(request, timeout=attempt.timeout_s, metadata=self._metadata)

    def _ask(
        self,
        method: Callable[[InferenceServiceStub], "grpc.UnaryUnaryMultiCallable[_Asked, _Answered]"],
        request: _Asked,
        retries: Retries,
    ) -> _Answered:
        """Make a call with one answer, as often as it takes."""
        while True:
            timeout_s = retries.begin(now_s())
            ask = method(self._stubs[retries.target])
            try:
                return ask(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                time.sleep(retries.after(translate.failure_of(error), now_s()))
