"""Updates put together into a whole answer."""

from dataclasses import dataclass, field

from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as pb
from expertmesh_client.journey import Journey
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
    """Takes every update of a journey, in order."""

    def __init__(self, journey: Journey[pb.GenerateRequest] | Journey[pb.ChatRequest]) -> None:
        self._journey = journey
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

    def answer(self) -> Answer:
        """Return the whole.

        Raises:
            RuntimeError: It is not whole: the stream was closed, or has failed.
        """
        if not self._journey.is_complete:
            raise RuntimeError(f"request {self._journey.request_id} was closed, or has failed")
        in_order = (sequence for _, sequence in sorted(self._sequences.items()))
        return Answer(
            request_id=self._journey.request_id,
            seed=self._journey.seed or 0,
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
