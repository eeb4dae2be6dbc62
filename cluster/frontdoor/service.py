"""The inference RPCs: admit, tokenize, send to a gateway, stream the answer."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
import structlog

from cluster.frontdoor import translate
from cluster.frontdoor.admission import Admission, Job, check
from cluster.frontdoor.answer import Answer, ChatAnswer, GenerateAnswer
from cluster.frontdoor.auth import Authenticator
from cluster.frontdoor.flight import ROUTE_KEY, Flight
from cluster.frontdoor.gateways import GatewayPool
from cluster.frontdoor.metrics import FrontDoorMetrics
from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.options import FrontDoorOptions
from cluster.frontdoor.ownership import Ownership
from cluster.frontdoor.parsers import OutputParser
from cluster.frontdoor.template import starts_in_reasoning
from cluster.pb.expertmesh.v1 import inference_pb2, inference_pb2_grpc
from workers.clock import Clock
from workers.errors import (
    DuplicateRequestError,
    ExpertmeshError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    RefusedError,
)

_log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

_POLLED = frozenset({"GetView", "WatchView", "GetStatus"})  # by every console, all the time

_LONG_TEXT = 2000  # characters; tokenizing more would hold up the other streams


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontDoorParts:
    """What the RPCs share."""

    options: FrontDoorOptions
    model: ModelInfo
    pool: GatewayPool
    ownership: Ownership
    admission: Admission
    authenticator: Authenticator
    metrics: FrontDoorMetrics
    clock: Clock


@asynccontextmanager
async def guarded(
    parts: FrontDoorParts, method: str, context: Context, *, for_operators: bool = False
) -> AsyncIterator[str]:
    """Authenticate a call, yield its tenant, and turn whatever is raised into a gRPC status."""
    code = grpc.StatusCode.OK
    identify = parts.authenticator.operator if for_operators else parts.authenticator.caller
    try:
        yield identify(context.invocation_metadata() or (), _identities(context)).tenant
    except ExpertmeshError as error:
        code = translate.code_of(error)
        await _abort(context, error)
    except asyncio.CancelledError:
        left_s: Any = context.time_remaining()  # None without a deadline
        is_late = left_s is not None and left_s <= 0
        code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        raise
    except Exception as error:  # noqa: BLE001  # ours; the client hears no details
        if context.done():  # written to a client that had just gone
            code = grpc.StatusCode.CANCELLED
            return
        code = grpc.StatusCode.INTERNAL
        _log.exception("call failed", method=method)
        await _abort(context, ExpertmeshError(f"internal error: {type(error).__name__}"))
    finally:
        parts.metrics.request_ended(method, code.name)
        is_routine = method in _POLLED and code is grpc.StatusCode.OK
        log = _log.debug if is_routine else _log.info
        log("call ended", method=method, code=code.name)


def _identities(context: Context) -> Sequence[bytes]:
    """Return the names in the client's certificate; none when the connection has none."""
    return tuple(context.peer_identities() or ())


async def _abort(context: Context, error: ExpertmeshError) -> NoReturn:
    details = translate.status_details(error)
    await context.abort(translate.code_of(error), str(error), details)


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Generate, Chat and what belongs to them.

    The streaming methods write their messages: so a cancelled call is noticed inside them, whatever
    they wait for, and its sequences are freed at once.
    """

    def __init__(self, parts: FrontDoorParts) -> None:
        self._parts = parts
        self._model = parts.model
        self._flights: dict[str, Flight] = {}

    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        """Continue a prompt."""
        arrived_s = self._parts.clock.now_s()
        async with guarded(self._parts, "Generate", context) as tenant:
            self._check_early(request)
            if request.WhichOneof("prompt") == "token_ids":
                token_ids = tuple(request.token_ids.ids)
            else:
                token_ids = await self._tokenize(request.text)
            request_id = request.request_id or uuid.uuid4().hex
            job = self._job(request, token_ids, tenant, request_id)
            answer = GenerateAnswer(job, request_id, self._model)
            await self._stream(job, answer, context, arrived_s)

    async def Chat(  # type: ignore[override]
        self, request: inference_pb2.ChatRequest, context: Context
    ) -> None:
        """Answer a conversation."""
        arrived_s = self._parts.clock.now_s()
        async with guarded(self._parts, "Chat", context) as tenant:
            self._check_early(request)
            tools = translate.tools_of(request)
            prompt = self._render(request, tools)
            token_ids = await self._tokenize(prompt)
            request_id = request.request_id or uuid.uuid4().hex
            job = self._job(request, token_ids, tenant, request_id)
            in_reasoning, schemas = starts_in_reasoning(prompt), translate.schemas_of(tools)
            parsers = [
                OutputParser(in_reasoning=in_reasoning, tools=schemas)
                for _ in range(job.request.num_sequences)
            ]
            answer = ChatAnswer(job, request_id, self._model, parsers)
            await self._stream(job, answer, context, arrived_s)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Return the token ids of a text."""
        async with guarded(self._parts, "Tokenize", context):
            self._check_model(request.model)
            token_ids = await self._tokenize(request.text)
            return inference_pb2.TokenizeResponse(token_ids=token_ids)
        raise AssertionError  # the guard has raised

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Return the text of token ids."""
        async with guarded(self._parts, "Detokenize", context):
            self._check_model(request.model)
            for i, token_id in enumerate(request.token_ids):
                if token_id >= self._model.vocab_size:
                    raise InvalidRequestError(
                        FieldViolation(
                            f"token_ids[{i}]",
                            f"token id {token_id} is out of range; the vocabulary has "
                            f"{self._model.vocab_size} tokens",
                        )
                    )
            text = await asyncio.to_thread(
                self._model.tokenizer.decode,
                request.token_ids,
                skip_special_tokens=request.skip_special_tokens,
            )
            return inference_pb2.DetokenizeResponse(text=text)
        raise AssertionError  # the guard has raised

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """Return the one model that is served."""
        del request
        async with guarded(self._parts, "ListModels", context):
            return inference_pb2.ListModelsResponse(models=[translate.model_message(self._model)])
        raise AssertionError  # the guard has raised

    async def Cancel(
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        """End a request of the caller, through whichever front door it runs."""
        async with guarded(self._parts, "Cancel", context) as tenant:
            key = self._key(tenant, request.request_id)
            flight = self._flights.get(key)
            if flight is not None:
                flight.cancel()
            elif not await self._parts.ownership.cancel(key):
                raise NotFoundError(f"no request {request.request_id!r} runs here")
            return inference_pb2.CancelResponse()
        raise AssertionError  # the guard has raised

    def _key(self, tenant: str, request_id: str) -> str:
        """Return the id by which the cluster knows a request: each tenant has its own names."""
        if self._parts.authenticator.is_open:
            return request_id
        return f"{quote(tenant, safe='')}/{request_id}"  # no tenant reaches into another's names

    def _check_model(self, name: str) -> None:
        if name not in ("", self._model.name):
            raise NotFoundError(f"model {name!r} is not served here; {self._model.name!r} is")

    def _check_early(self, request: translate.AnyRequest) -> None:
        """Refuse what needs no tokens to be refused."""
        self._check_model(request.model)
        self._parts.admission.check_room(is_resumed=translate.is_resumed(request))

    def _render(self, request: inference_pb2.ChatRequest, tools: list[dict[str, Any]]) -> str:
        if self._model.template is None:
            raise RefusedError(f"model {self._model.name!r} has no chat template; use Generate")
        if not request.messages:
            raise InvalidRequestError(FieldViolation("messages", "must not be empty"))
        thinking = request.enable_thinking if request.HasField("enable_thinking") else None
        return self._model.template.render(translate.messages_of(request), tools, thinking)

    async def _tokenize(self, text: str) -> tuple[int, ...]:
        encode = self._model.tokenizer.encode
        return encode(text) if len(text) < _LONG_TEXT else await asyncio.to_thread(encode, text)

    def _job(
        self,
        request: translate.AnyRequest,
        token_ids: tuple[int, ...],
        tenant: str,
        request_id: str,
    ) -> Job:
        """Return the validated request; its id is on every line that this call logs from now."""
        key = self._key(tenant, request_id)
        structlog.contextvars.bind_contextvars(request_id=key)
        job = translate.job_of(
            request,
            token_ids,
            self._model,
            request_id=key,
            seed=secrets.randbits(63),
            default_max_tokens=self._parts.options.default_max_tokens,
            max_sequences=self._parts.options.max_sequences,
            cache_salt=tenant,
        )
        check(
            job,
            self._parts.options,
            context_tokens=self._model.context_tokens,
            vocab_size=self._model.vocab_size,
        )
        return job

    async def _stream(
        self, job: Job, answer: Answer[Any], context: Context, arrived_s: float
    ) -> None:
        """Carry the request through the gateways and write what comes of it."""
        request, parts = job.request, self._parts
        key = request.request_id
        if key in self._flights and not job.takes_over:
            raise DuplicateRequestError(
                f"request {key} is in flight already; send resume_from to take it over"
            )
        with parts.admission.admitted(is_resumed=job.is_resumed) as started:
            parts.metrics.request_admitted(len(request.prompt_token_ids))
            flight = self._flights[key] = Flight(job, parts.pool, parts.ownership)
            timing = _Timing(parts, arrived_s, request.num_sequences)
            try:
                await context.write(answer.first())
                for end in answer.resume():
                    flight.end_sequence(end.sequence_index)
                    await context.write(end)
                async with aclosing(flight.events()) as events:
                    async for event in events:
                        response = answer.take(event)
                        if response.HasField("finish"):
                            flight.end_sequence(event.sequence_index)
                        if response.token_ids:
                            started()
                            timing.note(event.sequence_index, len(response.token_ids))
                        await context.write(response)
                context.set_trailing_metadata(((ROUTE_KEY, flight.route),))
            finally:
                if self._flights.get(key) is flight:  # else a later call has taken it over
                    del self._flights[key]


class _Timing:
    """Measures one request's time to first token and the gaps of its sequences."""

    def __init__(self, parts: FrontDoorParts, arrived_s: float, num_sequences: int) -> None:
        self._clock = parts.clock
        self._metrics = parts.metrics
        self._arrived_s = arrived_s
        self._last_s: list[float | None] = [None] * num_sequences
        self._has_started = False

    def note(self, sequence_index: int, num_tokens: int) -> None:
        """Note that tokens of a sequence are ready."""
        now_s = self._clock.now_s()
        if not self._has_started:
            self._has_started = True
            self._metrics.first_token(now_s - self._arrived_s)
        last_s = self._last_s[sequence_index]
        self._metrics.tokens(num_tokens, None if last_s is None else now_s - last_s)
        self._last_s[sequence_index] = now_s
