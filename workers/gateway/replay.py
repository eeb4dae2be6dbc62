"""Teacher forcing: was every token of a finished sequence what the sampler picks there?

Sums in another order move the last bits of logits; a near-tie may then choose another expert or
token, and after that two free runs have nothing in common. So an emitted sequence is fed through
the reference decoder token for token, and each choice is made again from the same history. A choice
that differs is explained only by a margin below tolerance, and always listed.

Source: DESIGN section 4, telling whether tokens are right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from workers.gateway.kv import blocks_for
from workers.model.batch import CHUNK_TOKENS, Segment, StepBatch
from workers.model.cache import SequenceCache
from workers.model.gate import GateProbe
from workers.model.sampler import Choice, SamplerState, sample
from workers.types import Request

REPLAY_CHUNK_TOKENS = 512


class ReferenceDecoder(Protocol):
    """A decoder over a LocalDispatcher in one process."""

    def forward(self, batch: StepBatch, cache: SequenceCache) -> Tensor:
        """Return logits, staging states in the cache."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Margins below which a difference is rounding.

    `logit` is for greedy choices; `probability` for drawn ones and for filters; `gate` for the
    probabilities of experts.
    """

    logit: float = 1e-3
    probability: float = 1e-4
    gate: float = 1e-6

    def explains(self, request: Request, choice: Choice, gate_margin: float) -> bool:
        """Whether some margin of a choice that differs is small enough."""
        is_greedy = request.sampling.temperature == 0.0
        return (
            choice.margin < (self.logit if is_greedy else self.probability)
            or choice.filter_margin < self.probability
            or gate_margin < self.gate
        )


EXACT = Tolerance(logit=0.0, probability=0.0, gate=0.0)  # bit-stable: nothing is explained


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A token that the replay would not have chosen.

    `margin` is the distance to choosing the emitted one (see `sampler.Choice`), `gate_margin` the
    least of any layer at this or an earlier position, whose states this one depends on.
    """

    index: int
    emitted: int
    chosen: int
    margin: float
    filter_margin: float
    gate_margin: float
    is_explained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What came of the replay of one sequence."""

    request_id: str
    sequence_index: int
    num_tokens: int
    mismatches: tuple[Mismatch, ...]

    @property
    def is_right(self) -> bool:
        """Whether every difference is explained."""
        return all(mismatch.is_explained for mismatch in self.mismatches)


def replay(
    decoder: ReferenceDecoder,
    cache: SequenceCache,
    request: Request,
    sequence_index: int,
    token_ids: Sequence[int],
    *,
    probe: GateProbe | None = None,
    tolerance: Tolerance | None = None,
    bit_stable: bool = False,
) -> ReplayReport:
    """Compute a sequence again and compare each of its tokens with what the sampler picks.

    Args:
        decoder: The reference, in one process.
        cache: A cache of its own, with room for the sequence; overwritten from block 0.
        request: As it was submitted first, without `emitted`.
        sequence_index: Which of its sequences.
        token_ids: The whole completion.
        probe: The decoder's probe; without one no mismatch is explained by the gate.
        tolerance: Default `Tolerance()`, or `EXACT` with `bit_stable`.
        bit_stable: Cut the work as the bit-stable scheduler does, one token at a time after the
            prompt, instead of in long chunks.
    """
    tolerance = tolerance or (EXACT if bit_stable else Tolerance())
    tokens = [*request.prompt_token_ids, *token_ids][:-1]  # nothing follows the last one
    num_prompt = len(request.prompt_token_ids)
    kv_blocks = tuple(range(blocks_for(len(tokens), cache.block_tokens)))
    state = SamplerState(request, sequence_index)
    gate_margin = float("inf")
    mismatches: list[Mismatch] = []
    for start, end in _cuts(num_prompt, len(tokens), bit_stable=bit_stable):
        first_row = max(start, num_prompt - 1)
        segment = Segment(
            token_ids=tuple(tokens[start:end]),
            start=start,
            state_block=0,
            kv_blocks=kv_blocks,
            num_logits=max(end - first_row, 0),
        )
        logits_RV = decoder.forward(StepBatch(segments=(segment,)), cache)
        cache.commit()
        margins_N = [float("inf")] * (end - start) if probe is None else _margins(probe)
        gate_margin = min([gate_margin, *margins_N[: first_row - start]])
        for row, logits_V in enumerate(logits_RV):
            index = first_row + row - num_prompt + 1
            gate_margin = min(gate_margin, margins_N[first_row - start + row])
            emitted = token_ids[index]
            (choice,) = sample(logits_V[None], [state], emitted=[emitted])
            if choice.token_id != emitted:
                mismatches.append(
                    Mismatch(
                        index=index,
                        emitted=emitted,
                        chosen=choice.token_id,
                        margin=choice.margin,
                        filter_margin=choice.filter_margin,
                        gate_margin=gate_margin,
                        is_explained=tolerance.explains(request, choice, gate_margin),
                    )
                )
            state.append(emitted)
    return ReplayReport(
        request_id=request.request_id,
        sequence_index=sequence_index,
        num_tokens=len(token_ids),
        mismatches=tuple(mismatches),
    )


def _cuts(num_prompt: int, num_tokens: int, *, bit_stable: bool) -> Iterator[tuple[int, int]]:
    start = 0
    while start < num_tokens:
        if not bit_stable:
            end = start + REPLAY_CHUNK_TOKENS
        elif start < num_prompt:
            end = min(start + CHUNK_TOKENS, num_prompt)
        else:
            end = start + 1
        yield start, min(end, num_tokens)
        start = end


def _margins(probe: GateProbe) -> list[float]:
    """Return the least margin of any layer, for each row of the last step."""
    margins: list[float] = probe.margins_LN.min(dim=0).values.tolist()
    return margins
