"""What a client was told, message by message, and what is wrong with it: pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of the load: greedy where `temperature` is 0, `num_sequences` answers.

    Its client comes back for what it lacks; meanwhile the request is kept for `resume_window_s`.
    """

    number: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    num_sequences: int
    resume_window_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens of one sequence in one message; `at_s` by the client's clock."""

    at_s: float
    first_token_index: int
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Answer:
    """All that came for one request, over as many calls as it took.

    `error` is the status that ended it, if one did; `breaks` are those after which its client came
    back. `legs` are the gateways that had its last call, in order, each with the tokens that were
    known when it took it.
    """

    ask: Ask
    sent_s: float
    arrivals: dict[int, list[Arrival]] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    error: str = ""
    breaks: list[str] = field(default_factory=list)
    legs: list[tuple[str, int]] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the end of every sequence came."""
        return len(self.finishes) == self.ask.num_sequences

    def token_ids(self, sequence: int) -> list[int]:
        """Return the tokens of a sequence, in order of arrival."""
        return [t for arrival in self.arrivals.get(sequence, ()) for t in arrival.token_ids]

    def left_at(self, gateway: str) -> int | None:
        """Return how many tokens were known when it went on elsewhere; None if it did not."""
        return {here: num for (here, _), (_, num) in pairwise(self.legs)}.get(gateway)

    def num_tokens_at(self, time_s: float) -> int:
        """Return how many tokens of the first sequence were there by then."""
        arrivals = self.arrivals.get(0, ())
        return sum(len(a.token_ids) for a in arrivals if a.at_s <= time_s)

    def times_s(self, sequence: int) -> list[float]:
        """Return when each message of a sequence came."""
        return [arrival.at_s for arrival in self.arrivals.get(sequence, ())]


@dataclass(frozen=True, slots=True)
class Problems:
    """Requests that a fault has harmed, each with what is wrong."""

    lost: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    out_of_order: tuple[str, ...] = ()
    short: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many in all."""
        return len(self.lost) + len(self.refused) + len(self.out_of_order) + len(self.short)


_REFUSALS = frozenset({"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "UNAVAILABLE"})


def problems_of(answers: Sequence[Answer]) -> Problems:
    """Find requests that failed, and token indexes with a gap or a repeat.

    Every request ignores the end-of-sequence token, so that a sequence without its `max_tokens`
    is short.
    """
    lost, refused, out_of_order, short = [], [], [], []
    for answer in answers:
        name = f"request {answer.ask.number}"
        if answer.error and not answer.arrivals and answer.error.split(":")[0] in _REFUSALS:
            refused.append(f"{name}: {answer.error}")
        elif answer.error:
            lost.append(f"{name}: {answer.error}")
        for sequence in range(answer.ask.num_sequences):
            due = 0
            for arrival in answer.arrivals.get(sequence, ()):
                if arrival.first_token_index != due:
                    out_of_order.append(
                        f"{name}.{sequence}: token {arrival.first_token_index} where {due} was due"
                    )
                due = arrival.first_token_index + len(arrival.token_ids)
            if not answer.error and (
                due != answer.ask.max_tokens or answer.finishes.get(sequence) != "LENGTH"
            ):
                short.append(
                    f"{name}.{sequence}: {due} of {answer.ask.max_tokens} tokens, "
                    f"finish {answer.finishes.get(sequence, 'none')}"
                )
    return Problems(tuple(lost), tuple(refused), tuple(out_of_order), tuple(short))
