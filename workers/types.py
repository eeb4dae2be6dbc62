"""The words that both planes speak: requests, what is sampled, and what is emitted. No tensors."""

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; already completed from the checkpoint's defaults and validated.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 mean no limit. `logit_bias` holds
    (token id, bias) pairs. The random number of a token depends on (seed, sequence index, position
    of the token in prompt plus completion) alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a sequence ends. Stop strings are matched by the front door, which sees text."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def ending_ids(self) -> frozenset[int]:
        """Token ids that end the sequence once `min_tokens` are out."""
        return frozenset(self.stop_token_ids + (() if self.ignore_eos else self.eos_token_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is reported beside tokens: None for nothing, else the number of alternatives."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SnapshotPlace:
    """Where a snapshot of one sequence of a request is: with `holder`, NAME.INCARNATION."""

    sequence_index: int
    position: int
    holder: str


@dataclass(frozen=True, slots=True)
class PrefixPlace:
    """Where the first tokens of a prompt are kept; `holder` is NAME.INCARNATION of a gateway."""

    num_tokens: int
    holder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a gateway is asked to do: `num_sequences` continuations of one prompt.

    `assignment` fences the owner of the request: events carry it, older ones are dropped.
    `emitted` holds, per sequence, the tokens that the client already has (resumption), and
    `snapshots` where to find what need not be computed again; `prefix` is where other requests have
    left the begin of its prompt, if it is cheaper to fetch than to compute. For `resume_window_s`
    it is kept when its client is gone, or when it has ended. `was_admitted` says that a gateway had
    it that has left or was lost, and `deaths` how many of them died with it. Only requests with the
    same `cache_salt` profit from each other's prompts.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    output: Output = Output()
    num_sequences: int = 1
    assignment: int = 0
    emitted: tuple[tuple[int, ...], ...] = ()
    snapshots: tuple[SnapshotPlace, ...] = ()
    prefix: PrefixPlace | None = None
    resume_window_s: float = 0.0
    was_admitted: bool = False
    deaths: int = 0
    cache_salt: str = ""


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    ERROR = "error"
    MOVED = "moved"  # not an end: its gateway leaves, and it goes on elsewhere from its snapshot


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token: natural logarithm, after penalties and bias, before filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """New tokens of one sequence, emitted after the step that committed them.

    `first_token_index` counts completion tokens from 0. `prompt_logprobs` comes once, with the
    first event of sequence 0; its first entry is None, since nothing precedes the first token.
    `cached_tokens` of the prompt were found in the prefix cache.
    """

    request_id: str
    sequence_index: int
    assignment: int
    first_token_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    error: str = ""


# Upper bounds of the classes in which recovery times are counted; one more class is above them.
RECOVERY_BOUNDS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStats:
    """One gateway's load and counters, taken between two steps. Counters only rise.

    `recoveries` counts the layers that lost rows with a link, by the time from when the loss was
    noticed until the layer was complete: one class per bound of `RECOVERY_BOUNDS_S`, and one above.

    `snapshots_stored` and `_skipped` are of this gateway's own sequences; `snapshot_bytes` and
    `snapshots_evicted` of those that it keeps for others. `restores` counts the sequences that went
    on here from a snapshot, with the known tokens behind it that were computed again
    (`replayed_tokens`); `recomputes` those whose client had tokens and that began at the prompt.

    What starts with `prefix` is of the prefix cache: `prefix_kv_bytes` and `prefix_state_bytes` are
    of rank 0, `prefix_fetches` the sequences that began with what another gateway had kept.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    state_blocks_used: int = 0
    state_blocks_total: int = 0
    steps: int = 0
    tokens_generated: int = 0
    tokens_prefilled: int = 0
    preemptions: int = 0
    resends: int = 0
    hedges: int = 0
    parked_s: float = 0.0
    dispatch_wait_s: float = 0.0
    step_s: float = 0.0
    longest_deadline_s: float = 0.0
    recovery_s: float = 0.0
    snapshots_stored: int = 0
    snapshots_skipped: int = 0
    snapshots_evicted: int = 0
    snapshot_bytes: int = 0
    restores: int = 0
    recomputes: int = 0
    replayed_tokens: int = 0
    recomputed_tokens: int = 0
    moved: int = 0
    recoveries: tuple[int, ...] = ()
    rows_by_worker: dict[str, int] = field(default_factory=dict)
    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_hit_tokens: int = 0
    prefix_blocks: int = 0
    prefix_states: int = 0
    prefix_kv_bytes: int = 0
    prefix_state_bytes: int = 0
    prefix_block_evictions: int = 0
    prefix_state_evictions: int = 0
    prefix_fetches: int = 0
    prefix_fetched_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """One expert worker's load and counters. Counters only rise."""

    slots_used: int = 0
    slots_total: int = 0
    links: int = 0
    calls: int = 0
    rows: int = 0
    pairs: int = 0
    stale_answers: int = 0
    queue_age_s: float = 0.0
    compute_s: float = 0.0
    batches: int = 0
