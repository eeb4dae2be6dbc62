"""How one step is laid out: computed once from its segments, shared by all layers.

Decoded tokens come first, longest sequence first, then prefill chunks. Rows are padded so that the
ranks of a group own equal shares; padding rows lie at the end, belong to no sequence and are never
dispatched. Knows positions and block ids, no weights and no states.

Shape legend: R padded rows, N rows, S segments, B decoded rows, F rotary frequencies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.batch import CHUNK_TOKENS, Segment
from workers.model.layers import ROW_TILE
from workers.model.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """What of the gateway shapes every step."""

    rank: int
    size: int
    block_tokens: int
    bit_stable: bool
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A prefill chunk: rows start:stop of the step belong to one segment."""

    segment: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Its rows in the step."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The layout of one step on one rank; the first `num_decode` segments are one row each.

    `decode_groups` are the decoded rows that are computed together: all of them, or in bit-stable
    mode each alone. `own` are the rows whose residual this rank carries, `num_own` of them real.
    `batch_rows_N` maps rows to their place in the batch as given.
    """

    segments: tuple[Segment, ...]
    num_rows: int
    num_padded: int
    num_decode: int
    decode_groups: tuple[slice, ...]
    chunks: tuple[Chunk, ...]
    own: slice
    num_own: int
    token_ids_R: Tensor
    rotations_R1F: Tensor
    kv_slots_N: Tensor
    logit_rows: Tensor
    batch_rows_N: tuple[int, ...]

    def cut(self, x_R: Tensor) -> Tensor:
        """Drop the padding rows."""
        return x_R if self.num_rows == self.num_padded else x_R[: self.num_rows]

    def cut_own(self, x_S: Tensor) -> Tensor:
        """Drop the padding rows of this rank's share."""
        return x_S if self.num_own == x_S.shape[0] else x_S[: self.num_own]

    def pad(self, x_N: Tensor) -> Tensor:
        """Append zero rows up to `num_padded`."""
        missing = self.num_padded - x_N.shape[0]
        return functional.pad(x_N, (0, 0) * (x_N.dim() - 1) + (0, missing)) if missing else x_N


def plan_step(
    segments: Sequence[Segment], rotary: RotaryEmbedding, options: StepOptions
) -> StepPlan:
    """Lay out the segments of one step (at least one), the same on every rank but for `own`.

    A segment of one token that continues a sequence is computed by the decode kernels; everything
    else by the chunk kernels.
    """
    if options.bit_stable:
        assert all(_within_chunk(s) for s in segments), "a bit-stable segment crosses a chunk"
    order = sorted(
        range(len(segments)), key=lambda i: (not _decodes(segments[i]), -segments[i].start)
    )
    ordered = [segments[i] for i in order]
    first_rows, num_rows = _offsets(segments)
    starts, _ = _offsets(ordered)
    num_decode = sum(map(_decodes, ordered))
    alone = [slice(i, i + 1) for i in range(num_decode)]
    multiple = options.size * (ROW_TILE if options.bit_stable else 1)
    num_padded = num_rows + -num_rows % multiple
    share = num_padded // options.size
    own = slice(options.rank * share, (options.rank + 1) * share)
    padding = [0] * (num_padded - num_rows)
    positions = [p for s in ordered for p in range(s.start, s.start + len(s.token_ids))]
    logit_row_of = {
        index: range(
            start + len(segment.token_ids) - segment.num_logits, start + len(segment.token_ids)
        )
        for index, segment, start in zip(order, ordered, starts, strict=True)
    }
    lists = [
        [t for s in ordered for t in s.token_ids] + padding,
        positions + padding,
        [slot for s in ordered for slot in _kv_slots(s, options.block_tokens)],
        [row for index in range(len(segments)) for row in logit_row_of[index]],
    ]
    # One upload for all of them.
    token_ids_R, positions_R, kv_slots_N, logit_rows = torch.tensor(
        list(chain.from_iterable(lists)), dtype=torch.int64, device=options.device
    ).split_with_sizes([len(values) for values in lists])

    return StepPlan(
        segments=tuple(ordered),
        num_rows=num_rows,
        num_padded=num_padded,
        num_decode=num_decode,
        decode_groups=tuple(alone if options.bit_stable else [slice(0, num_decode)][:num_decode]),
        chunks=tuple(
            Chunk(segment=i, start=starts[i], stop=starts[i] + len(ordered[i].token_ids))
            for i in range(num_decode, len(ordered))
        ),
        own=own,
        num_own=min(max(num_rows - own.start, 0), share),
        token_ids_R=token_ids_R,
        rotations_R1F=rotary.rotations(positions_R),
        kv_slots_N=kv_slots_N,
        logit_rows=logit_rows,
        batch_rows_N=tuple(
            first_rows[i] + offset for i in order for offset in range(len(segments[i].token_ids))
        ),
    )


def _decodes(segment: Segment) -> bool:
    return len(segment.token_ids) == 1 and segment.start > 0


def _within_chunk(segment: Segment) -> bool:
    last = segment.start + len(segment.token_ids) - 1
    return segment.start // CHUNK_TOKENS == last // CHUNK_TOKENS


def _offsets(segments: Sequence[Segment]) -> tuple[list[int], int]:
    """Return the first row of each segment, and the number of rows."""
    offsets, total = [], 0
    for segment in segments:
        offsets.append(total)
        total += len(segment.token_ids)
    return offsets, total


def _kv_slots(segment: Segment, block_tokens: int) -> list[int]:
    """Return where the keys and values of the segment's rows are written."""
    return [
        segment.kv_blocks[p // block_tokens] * block_tokens + p % block_tokens
        for p in range(segment.start, segment.start + len(segment.token_ids))
    ]
