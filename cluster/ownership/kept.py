"""What was emitted of one request, kept for a client that has lost some of it. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from workers.types import Request, TokenEvent, TokenLogprob

EVENT_TOKENS = 4096  # of one event: with 20 alternatives each about 1 MB


class KeptRequest:
    """The tokens of a request since its beginning, and how its sequences ended.

    Of the tokens that the request came with, log-probabilities are not known.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        count = request.num_sequences
        self._tokens = [list(tokens) for tokens in request.emitted] or [[] for _ in range(count)]
        self._num_before = [len(tokens) for tokens in self._tokens]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._prompt_logprobs: Sequence[TokenLogprob | None] = ()
        self._cached_tokens = [0] * count
        self._ends: dict[int, TokenEvent] = {}

    @property
    def has_ended(self) -> bool:
        """Whether all its sequences have."""
        return len(self._ends) == self._request.num_sequences

    @property
    def num_tokens(self) -> int:
        """How many tokens are kept, with those of the prompt."""
        return len(self._request.prompt_token_ids) + sum(map(len, self._tokens))

    @property
    def num_new(self) -> int:
        """How many tokens the running sequence has brought here that has brought fewest."""
        counts = zip(self._tokens, self._num_before, strict=True)
        running = [len(t) - n for i, (t, n) in enumerate(counts) if i not in self._ends]
        return min(running, default=0)

    def take(self, event: TokenEvent) -> None:
        """Keep what a gateway emits."""
        index = event.sequence_index
        self._tokens[index].extend(event.token_ids)
        self._logprobs[index].extend(event.logprobs)
        self._prompt_logprobs = self._prompt_logprobs or event.prompt_logprobs
        self._cached_tokens[index] = max(self._cached_tokens[index], event.cached_tokens)
        if event.finish is not None:
            self._ends[index] = event

    def continues(self, request: Request) -> bool:
        """Whether a request is this one, and whoever sends it has a beginning of what is kept."""
        if _substance(request) != _substance(self._request):
            return False
        for index, has in enumerate(_emitted(request)):
            kept = self._tokens[index]
            if has != kept[: len(has)]:
                return False
            if request.output.logprobs is not None and len(has) < self._num_before[index]:
                return False
        wants_prompt = request.output.prompt_logprobs is not None
        return not (wants_prompt and self._num_before[0] and not _emitted(request)[0])

    def since(self, request: Request) -> list[TokenEvent]:
        """Return, as events of the request's assignment, all that its sender lacks.

        No event is larger than a message may be, however much has come meanwhile.
        """
        return [
            event
            for index, has in enumerate(_emitted(request))
            for event in self._events_of(request, index, len(has))
        ]

    def _events_of(self, request: Request, index: int, num_had: int) -> Iterator[TokenEvent]:
        num_tokens, end = len(self._tokens[index]), self._ends.get(index)
        for first in range(num_had, max(num_tokens, num_had + 1), EVENT_TOKENS):
            behind = min(first + EVENT_TOKENS, num_tokens)
            is_last = behind == num_tokens
            if first == behind and end is None:
                return
            before = self._num_before[index]
            ending = end if is_last else None
            yield TokenEvent(
                request_id=request.request_id,
                sequence_index=index,
                assignment=request.assignment,
                first_token_index=first,
                token_ids=tuple(self._tokens[index][first:behind]),
                logprobs=tuple(self._logprobs[index][max(first - before, 0) : behind - before]),
                prompt_logprobs=tuple(self._prompt_logprobs) if not first and not index else (),
                finish=ending.finish if ending else None,
                stop_token_id=ending.stop_token_id if ending else None,
                cached_tokens=self._cached_tokens[index],
            )


def _emitted(request: Request) -> list[list[int]]:
    return [list(tokens) for tokens in request.emitted] or [
        [] for _ in range(request.num_sequences)
    ]


def _substance(request: Request) -> Request:
    """Return the request without what differs from one submission to the next."""
    return replace(
        request,
        assignment=0,
        emitted=(),
        snapshots=(),
        prefix=None,
        resume_window_s=0.0,
        was_admitted=False,
        deaths=0,
    )
