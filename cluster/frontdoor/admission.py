"""Accept or refuse a request: the rules that its fields keep, and the bound on the queue."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from cluster.frontdoor.metrics import FrontDoorMetrics
from cluster.frontdoor.options import FrontDoorOptions
from workers.errors import (
    DrainingError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
)
from workers.types import Request

_MAX_ID_LENGTH = 128
_MAX_WINDOW_S = 3600.0
_MAX_LIST_LENGTH = 1024
_MAX_PROMPT_LOGPROBS = 1_000_000  # about 12 MB, of the 16 MiB that a message may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request in full: what the gateway is asked, and what the front door does itself.

    `prompt_field` is the name under which the client sent the prompt. `is_named` says that the
    client chose the request id, so that it may be in use; `takes_over`, that the client has lost
    its stream and takes the request from whoever still has it.
    """

    request: Request
    stop_strings: tuple[str, ...] = ()
    is_named: bool = False
    takes_over: bool = False
    prompt_field: str = "text"

    @property
    def is_resumed(self) -> bool:
        """Whether it was admitted before: its client has tokens of it, or its stream at least."""
        return self.takes_over or any(self.request.emitted)


def check(job: Job, options: FrontDoorOptions, *, context_tokens: int, vocab_size: int) -> None:
    """Check every rule.

    Raises:
        InvalidRequestError: One entry for each field that is wrong.
    """
    violations = (
        *_sampling_violations(job, options, vocab_size),
        *_stopping_violations(job, options, vocab_size),
        *_output_violations(job, options),
        *_prompt_violations(job, context_tokens, vocab_size),
        *_resume_violations(job, vocab_size),
    )
    if violations:
        raise InvalidRequestError(*violations)


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    low_is_allowed: bool = True

    def check(self, field: str, value: float) -> Iterator[FieldViolation]:
        above = self.low <= value if self.low_is_allowed else self.low < value
        if not (above and value <= self.high):  # also for NaN
            floor = f"from {self.low:g}" if self.low_is_allowed else f"above {self.low:g}"
            yield FieldViolation(field, f"must be {floor} up to {self.high:g}, not {value:g}")


def _sampling_violations(
    job: Job, options: FrontDoorOptions, vocab_size: int
) -> Iterator[FieldViolation]:
    sampling = job.request.sampling
    for field, bounds in (
        ("temperature", _Range(0, 100)),
        ("top_p", _Range(0, 1, low_is_allowed=False)),
        ("top_k", _Range(0, vocab_size)),
        ("min_p", _Range(0, 1)),
        ("presence_penalty", _Range(-2, 2)),
        ("frequency_penalty", _Range(-2, 2)),
        ("repetition_penalty", _Range(0.01, 10)),  # less would make a logit infinite
    ):
        yield from bounds.check(f"sampling.{field}", getattr(sampling, field))
    yield from _Range(1, options.max_sequences).check(
        "sampling.num_sequences", job.request.num_sequences
    )
    if len(sampling.logit_bias) > _MAX_LIST_LENGTH:
        yield FieldViolation("sampling.logit_bias", f"must have at most {_MAX_LIST_LENGTH} entries")
        return
    yield from islice(_bias_violations(sampling.logit_bias, vocab_size), 1)


def _bias_violations(
    logit_bias: Iterable[tuple[int, float]], vocab_size: int
) -> Iterator[FieldViolation]:
    for token_id, bias in logit_bias:
        field = f"sampling.logit_bias[{token_id}]"
        yield from _token_violations(field, (token_id,), vocab_size)
        yield from _Range(-100, 100).check(field, bias)


def _stopping_violations(
    job: Job, options: FrontDoorOptions, vocab_size: int
) -> Iterator[FieldViolation]:
    stopping = job.request.stopping
    if stopping.max_tokens < 1:
        yield FieldViolation("stopping.max_tokens", "must be at least 1")
    elif stopping.min_tokens > stopping.max_tokens:
        yield FieldViolation(
            "stopping.min_tokens",
            f"must be at most max_tokens ({stopping.max_tokens}), not {stopping.min_tokens}",
        )
    if len(job.stop_strings) > options.max_stop_strings:
        yield FieldViolation(
            "stopping.stop_strings", f"must have at most {options.max_stop_strings} entries"
        )
    for i, stop in enumerate(job.stop_strings[: options.max_stop_strings]):
        if not 1 <= len(stop) <= options.max_stop_string_length:
            yield FieldViolation(
                f"stopping.stop_strings[{i}]",
                f"must have 1 to {options.max_stop_string_length} characters, not {len(stop)}",
            )
    if len(stopping.stop_token_ids) > _MAX_LIST_LENGTH:
        yield FieldViolation(
            "stopping.stop_token_ids", f"must have at most {_MAX_LIST_LENGTH} entries"
        )
    listed = stopping.stop_token_ids[:_MAX_LIST_LENGTH]
    yield from _token_violations("stopping.stop_token_ids[{}]", listed, vocab_size)


def _output_violations(job: Job, options: FrontDoorOptions) -> Iterator[FieldViolation]:
    for field in ("logprobs", "prompt_logprobs"):
        wanted = getattr(job.request.output, field)
        if wanted is not None:
            yield from _Range(0, options.max_logprobs).check(f"output.{field}", wanted)
    wanted = job.request.output.prompt_logprobs
    num_tokens = len(job.request.prompt_token_ids)
    if wanted is not None and num_tokens * (wanted + 1) > _MAX_PROMPT_LOGPROBS:
        yield FieldViolation(
            "output.prompt_logprobs",
            f"{num_tokens} prompt tokens with {wanted} alternatives each do not fit into one "
            f"message: together at most {_MAX_PROMPT_LOGPROBS} log-probabilities",
        )


def _prompt_violations(job: Job, context_tokens: int, vocab_size: int) -> Iterator[FieldViolation]:
    request = job.request
    num_tokens = len(request.prompt_token_ids)
    if len(request.request_id) > _MAX_ID_LENGTH:
        yield FieldViolation("request_id", f"must have at most {_MAX_ID_LENGTH} characters")
    if not num_tokens:
        yield FieldViolation(job.prompt_field, "the prompt must not be empty")
    elif num_tokens >= context_tokens:
        yield FieldViolation(
            job.prompt_field,
            f"the prompt has {num_tokens} tokens; the context of {context_tokens} tokens leaves "
            f"room for a prompt of {context_tokens - 1} at most",
        )
    elif num_tokens + request.stopping.max_tokens > context_tokens:
        yield FieldViolation(
            "stopping.max_tokens",
            f"{num_tokens} prompt tokens and max_tokens {request.stopping.max_tokens} exceed the "
            f"context of {context_tokens} tokens; at most {context_tokens - num_tokens} are left",
        )
    yield from _token_violations(f"{job.prompt_field}[{{}}]", request.prompt_token_ids, vocab_size)


def _resume_violations(job: Job, vocab_size: int) -> Iterator[FieldViolation]:
    yield from _Range(0, _MAX_WINDOW_S).check("resume_window_s", job.request.resume_window_s)
    for tokens in job.request.emitted:
        if len(tokens) > job.request.stopping.max_tokens >= 1:
            yield FieldViolation(
                "resume_from",
                f"holds {len(tokens)} tokens of a sequence, more than max_tokens "
                f"({job.request.stopping.max_tokens})",
            )
        yield from _token_violations("resume_from", tokens, vocab_size)


def _token_violations(
    field: str, token_ids: Sequence[int], vocab_size: int
) -> Iterator[FieldViolation]:
    """Name the first token that is none, in a field with its place: an error has to fit a header.

    Prompts are long, so nothing is made for those that are right.
    """
    place = next((i for i, token_id in enumerate(token_ids) if token_id >= vocab_size), None)
    if place is not None:
        what = f"token id {token_ids[place]} is out of range"
        yield FieldViolation(field.format(place), f"{what}; the vocabulary has {vocab_size} tokens")


class Admission:
    """Counts the requests at this front door and refuses what is too much.

    A resumed request is never refused for want of room: it was admitted before.
    """

    def __init__(self, options: FrontDoorOptions, metrics: FrontDoorMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._running: set[object] = set()
        self._waiting: set[object] = set()
        self._left = asyncio.Event()
        self.is_draining = False

    @property
    def num_running(self) -> int:
        """Requests admitted and not ended."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Those of them that have no token yet, of which resumed ones had one elsewhere."""
        return len(self._waiting)

    def check_room(self, *, is_resumed: bool = False) -> None:
        """Refuse early, before anything is computed for a request.

        Raises:
            DrainingError: This front door takes no new work.
            OverloadedError: The queue is full.
        """
        if self.is_draining:
            raise DrainingError("this front door is draining; call another one")
        if is_resumed:
            return
        for count, bound, what in (
            (self.num_running, self._options.max_requests, "are in flight"),
            (self.num_waiting, self._options.max_waiting, "wait for their first token"),
        ):
            if count >= bound:
                raise OverloadedError(
                    f"the queue is full: {count} requests {what}", self._options.retry_after_s
                )

    async def wait_idle(self, deadline_s: float) -> bool:
        """Wait until no request is left; says whether that came before the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                while self._running:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            return False
        return True

    @contextmanager
    def admitted(self, *, is_resumed: bool) -> Iterator[Callable[[], None]]:
        """Hold a place for a request; call what is given when its first token is there.

        Raises:
            DrainingError: This front door takes no new work.
            OverloadedError: The queue is full.
        """
        self.check_room(is_resumed=is_resumed)
        key = object()
        self._running.add(key)
        if not is_resumed:
            self._waiting.add(key)
        self._note()

        def started() -> None:
            if key in self._waiting:
                self._waiting.remove(key)
                self._note()

        try:
            yield started
        finally:
            self._running.discard(key)
            self._waiting.discard(key)
            self._left.set()
            self._note()

    def _note(self) -> None:
        self._metrics.load_changed(self.num_running, self.num_waiting)
