"""Updates put together into a whole answer."""

from dataclasses import dataclass, field

from expertmesh_client.types import (
    Answer,
    Completion,
    Finish,
    TokenLogprob,
    ToolCall,
    Update,
)


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


class Collector:
    """Takes every update of one request, in order."""

    def __init__(self) -> None:
        self._sequences: dict[int, _Sequence] = {}
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def add(self, update: Update) -> None:
        """Take what is new."""
        sequence = self._sequences.setdefault(update.sequence_index, _Sequence())
        sequence.token_ids += update.token_ids
        sequence.texts.append(update.text)
        sequence.reasonings.append(update.reasoning)
        sequence.tool_calls += update.tool_calls
        sequence.logprobs += update.logprobs
        sequence.finish = update.finish
        self._prompt_logprobs = self._prompt_logprobs or update.prompt_logprobs

    def answer(self, request_id: str, seed: int) -> Answer:
        """Return the whole; every sequence has ended."""
        in_order = (sequence for _, sequence in sorted(self._sequences.items()))
        return Answer(
            request_id=request_id,
            seed=seed,
            completions=tuple(map(_completion, in_order)),
            prompt_logprobs=self._prompt_logprobs,
        )


def _completion(sequence: _Sequence) -> Completion:
    assert sequence.finish is not None
    return Completion(
        token_ids=tuple(sequence.token_ids),
        text="".join(sequence.texts),
        reasoning="".join(sequence.reasonings),
        tool_calls=tuple(sequence.tool_calls),
        logprobs=tuple(sequence.logprobs),
        finish=sequence.finish,
    )
