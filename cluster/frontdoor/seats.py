"""What a front door knows of a gateway's load: the requests that it has there itself. Pure."""

from dataclasses import dataclass, field
from typing import Protocol

from workers.errors import ExpertmeshError
from workers.types import Request, SnapshotPlace, TokenEvent

_LONGER = 4  # a sequence that is longer than expected goes on for a quarter of that, always


class Passenger(Protocol):
    """A request that a session carries; hears of events, of a refusal, and of the session's end."""

    @property
    def request_id(self) -> str:
        """The id under which the gateway knows it."""
        ...

    @property
    def assignment(self) -> int:
        """The number of its present owner; events of another one are not for it."""
        ...

    def deliver(self, event: TokenEvent) -> None:
        """Take new tokens."""
        ...

    def refused(self, error: ExpertmeshError) -> None:
        """The gateway does not take it."""
        ...

    def held(self, place: SnapshotPlace) -> None:
        """A snapshot of it is whole somewhere."""
        ...

    def lost(self) -> None:
        """The gateway can no longer be reached."""
        ...


@dataclass(slots=True)
class Seat:
    """One request at one gateway, and how many tokens are still ahead of its end, as expected.

    They are counted as events come: the choice of a gateway adds up all seats.

    Args:
        passenger: Who hears of it.
        request: As it was submitted.
        spared_tokens: Of its prompt and of what was emitted before; they need no computing there.
        expected_tokens: Of one sequence, unless less are allowed.
    """

    passenger: Passenger
    request: Request
    spared_tokens: int
    expected_tokens: int
    tokens_ahead: int = field(init=False)
    _has_begun: bool = False
    _num_tokens: list[int] = field(init=False)
    _ended: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        emitted = self.request.emitted or ((),) * self.request.num_sequences
        self._num_tokens = [len(tokens) for tokens in emitted]
        self.tokens_ahead = self._count()

    def deliver(self, event: TokenEvent) -> None:
        """Count what has come, and pass it on."""
        self._has_begun |= bool(event.token_ids)
        self._num_tokens[event.sequence_index] += len(event.token_ids)
        if event.finish is not None:
            self._ended.add(event.sequence_index)
        self.tokens_ahead = self._count()
        self.passenger.deliver(event)

    @property
    def num_running(self) -> int:
        """Sequences that have not ended there."""
        return self.request.num_sequences - len(self._ended)

    def _count(self) -> int:
        """Return the tokens until it ends, each of the prompt and of the completions alike."""
        known = len(self.request.prompt_token_ids) + max(self._num_tokens)
        prefill = 0 if self._has_begun else max(known - self.spared_tokens, 0)
        running = (n for i, n in enumerate(self._num_tokens) if i not in self._ended)
        return prefill + sum(map(self._remaining, running))

    def _remaining(self, num_tokens: int) -> int:
        expected = max(self.expected_tokens - num_tokens, self.expected_tokens // _LONGER)
        return max(min(self.request.stopping.max_tokens - num_tokens, expected), 0)
