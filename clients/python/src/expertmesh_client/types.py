"""What a caller gives and gets. Fields that are None take the server's defaults."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypedDict


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Whatever is None comes from the model.

    `temperature` 0 is greedy. The same `seed` gives the same tokens, whatever else is served.
    `logit_bias` maps token ids to what is added to their logits.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_sequences: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a sequence ends, beside the model's own end-of-sequence tokens."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop_strings: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is reported beside tokens: log-probabilities, each with that many alternatives."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None


class RequestOptions(TypedDict, total=False):
    """What any request may be given by name.

    `model` None is the client's. `request_id` is unique among the caller's requests in flight, and
    drawn where there is none. `resume_window_s` is how long the server keeps the sequences of a
    client that is gone. `timeout_s` is for the whole answer, whatever happens on the way; without
    one, `RetryPolicy.stall_s` bounds it.
    """

    sampling: Sampling | None
    stopping: Stopping | None
    output: Output | None
    model: str | None
    request_id: str | None
    resume_window_s: float
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asks for; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(json.loads(self.arguments or "{}"))


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `role` is "system", "user", "assistant" or "tool"; a tool's message names the call that it is
    the result of.
    """

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str = ""


class FinishReason(StrEnum):
    """Why a sequence has ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TOOL_CALLS = "tool_calls"
    UNKNOWN = "unknown"  # a newer server's reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a sequence took, in tokens; `cached_tokens` of the prompt were not computed anew."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How a sequence has ended, and which stop string or token did it, if one did."""

    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability; None for a first token, which nothing precedes.

    `top` holds (token id, log-probability) of the most likely tokens there.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What is new in a sequence. Text can lag its tokens: it comes in whole characters only.

    `text` is the continuation of a prompt or the content of an answer; `first_token_index` counts
    the sequence's tokens from 0, without gap or repeat.
    """

    sequence_index: int = 0
    first_token_index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sequence in full."""

    token_ids: tuple[int, ...]
    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. The properties are those of its first sequence."""

    request_id: str
    seed: int
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """What it says."""
        return self.completions[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """What it asks for."""
        return self.completions[0].tool_calls

    @property
    def finish(self) -> Finish:
        """How it has ended, and what it took."""
        return self.completions[0].finish

    @property
    def message(self) -> Message:
        """It, as a turn of the conversation."""
        first = self.completions[0]
        return Message(
            "assistant", first.text, first.reasoning or None, tool_calls=first.tool_calls
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is served; `context_tokens` bounds prompt and completion together."""

    name: str
    context_tokens: int
    vocabulary_size: int
    default_sampling: Sampling
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
