"""What one step computes: plain data, the same on every rank of a gateway."""

from dataclasses import dataclass

CHUNK_TOKENS = 64
"""Tokens of a chunk of the delta rule. In bit-stable mode no segment crosses a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive new tokens of one sequence: a prefill chunk, or one decoded token.

    `start` is the position of the first one, that is, how many tokens of the sequence are
    committed; a sequence at 0 begins from zero state. `kv_blocks` covers positions 0 to
    start + len(token_ids). Logits are wanted for the last `num_logits` rows.
    """

    token_ids: tuple[int, ...]
    start: int
    state_block: int
    kv_blocks: tuple[int, ...]
    num_logits: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The segments of one step, each of another sequence; empty for an idle tick."""

    segments: tuple[Segment, ...] = ()

    @property
    def num_rows(self) -> int:
        """Token rows in all."""
        return sum(len(s.token_ids) for s in self.segments)
