"""When a running sequence is captured, and what all ranks then do to their caches.

A sequence has at most one capture under way, so a holder that is slow or gone costs snapshots and
never a step. A capture begins where the newest snapshot ends that the holder is known to have.
"""

import threading
from dataclasses import dataclass
from typing import Any

from workers.gateway.sequence import Sequence
from workers.gateway.snapshot import Ended, Holder, Stamp, digest_of
from workers.model.packed import PackedShard


@dataclass(frozen=True, slots=True)
class Captured:
    """What one rank copied aside, on its way to being packed and sent to the holder."""

    stamp: Stamp
    holder: Holder
    start: int
    shard: Any  # a `SequenceShard`, or a fake's


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """Copies a sequence aside, in host memory: its states, and its KV rows from `start` on."""

    stamp: Stamp
    holder: Holder
    start: int
    state_block: int
    kv_blocks: tuple[int, ...]

    def apply(self, cache: Any) -> Captured:  # noqa: ANN401 - a `SequenceCache`, or a fake
        """Copy; the rank hands the result on."""
        shard = cache.copy_aside(self.state_block, self.kv_blocks, self.start, self.stamp.position)
        return Captured(self.stamp, self.holder, self.start, shard)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePrefix:
    """Copies a prefix aside that the prefix cache keeps: all its KV rows, and its state."""

    stamp: Stamp
    holder: Holder
    place: int
    kv_blocks: tuple[int, ...]

    def apply(self, cache: Any) -> Captured:  # noqa: ANN401 - a `SequenceCache`, or a fake
        """Copy; the rank hands the result on."""
        shard = cache.copy_kept_aside(self.place, self.kv_blocks, self.stamp.position)
        return Captured(self.stamp, self.holder, 0, shard)


@dataclass(frozen=True, slots=True)
class Release:
    """Has every rank tell the holder that a sequence has left, after all that it captured of it."""

    ended: Ended
    holder: Holder

    def apply(self, _cache: object) -> "Release":
        """Do nothing to the cache; the rank hands the word on."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """Writes a snapshot into the blocks of a sequence, before its first step."""

    state_block: int
    kv_blocks: tuple[int, ...]
    shards: tuple[PackedShard, ...]

    def apply(self, cache: Any) -> None:  # noqa: ANN401 - a `SequenceCache`, or a fake
        """Write this rank's share."""
        cache.restore(self.state_block, self.kv_blocks, self.shards)


@dataclass(slots=True)
class _Progress:
    """What of a sequence the holder has, and the position that is on its way."""

    position: int = 0
    under_way: int | None = None
    not_before: int = 0  # where the next one is tried, after one that failed
    skipped_from: int = 0  # where one that is due and not taken counts
    is_last: bool = False  # what is on its way, or came, was captured since `hurry`


class CaptureBook:
    """Says what is to be captured and hears what was stored. May be called from any thread.

    Args:
        interval_tokens: Tokens from one snapshot of a sequence to the next; 0 captures nothing.
        max_under_way: Captures on their way at once; more are skipped.

    Attributes:
        num_skipped: Whole intervals of completion tokens without a capture, since one was on its
            way still. A prompt passes many intervals in one step, and nobody has heard of it yet.
    """

    def __init__(self, interval_tokens: int, *, max_under_way: int = 64) -> None:
        self._interval_tokens = interval_tokens
        self._max_under_way = max_under_way
        self._lock = threading.Lock()
        self._holder: Holder | None = None
        self._weights_version = ""
        self._progress: dict[tuple[str, int, int], _Progress] = {}
        self._former: dict[tuple[str, int, int], set[Holder]] = {}  # not told yet that it ended
        self._num_under_way = 0
        self._is_urgent = False
        self.num_stored = 0
        self.num_skipped = 0

    @property
    def holder(self) -> Holder | None:
        """Who keeps this gateway's snapshots."""
        return self._holder

    @property
    def weights_version(self) -> str:
        """The weights that caches are computed with."""
        return self._weights_version

    def send_to(self, holder: Holder | None, weights_version: str) -> None:
        """Hear who keeps the snapshots from now on; a new holder gets whole ones first.

        Until it has one of a sequence, what the holder before has is the only one there is.
        """
        with self._lock:
            self._weights_version = weights_version
            if holder == self._holder:
                return
            for key, progress in self._progress.items():
                if self._holder is not None and (progress.position or progress.under_way):
                    self._former.setdefault(key, set()).add(self._holder)
            self._holder = holder
            self._progress.clear()
            self._num_under_way = 0

    def hurry(self) -> None:
        """Capture every sequence once more at once: this gateway is about to leave."""
        with self._lock:
            self._is_urgent = self._interval_tokens > 0

    def capture(self, sequence: Sequence) -> Capture | None:
        """Return the capture of a sequence that has just advanced, if one is due."""
        with self._lock:
            if self._holder is None or not self._interval_tokens:
                return None
            progress = self._progress.setdefault(_key(sequence), _Progress())
            if not self._is_wanted(sequence, progress):
                return None
            if progress.under_way is not None or self._num_under_way >= self._max_under_way:
                self._skip(sequence, progress)
                return None
            progress.under_way = sequence.computed
            progress.skipped_from = sequence.computed + self._interval_tokens
            progress.is_last = self._is_urgent
            self._num_under_way += 1
            holder, start = self._holder, progress.position
        assert sequence.state_block is not None
        return Capture(
            stamp=Stamp(
                request_id=sequence.request.request_id,
                sequence_index=sequence.index,
                assignment=sequence.request.assignment,
                position=sequence.computed,
                weights_version=self._weights_version,
                tokens=digest_of(sequence.tokens[: sequence.computed]),
            ),
            holder=holder,
            start=start,
            state_block=sequence.state_block,
            kv_blocks=tuple(sequence.kv_blocks),
        )

    def stored(self, stamp: Stamp, holder: Holder) -> frozenset[Holder]:
        """Hear that a snapshot is whole at its holder; returns who need keep none any more."""
        if (progress := self._arrived(stamp, holder)) is None:
            return frozenset()
        progress.position = stamp.position
        self.num_stored += 1
        with self._lock:
            key = (stamp.request_id, stamp.sequence_index, stamp.assignment)
            return frozenset(self._former.pop(key, set()) - {holder})

    def failed(self, stamp: Stamp, holder: Holder, *, has_base: bool) -> None:
        """Hear that a snapshot is not there; without its base the next one is sent whole.

        Otherwise the holder may be out of reach: it is asked again after a quarter of the interval.
        """
        progress = self._arrived(stamp, holder)
        if progress is not None:
            progress.is_last = False
            if has_base:
                progress.not_before = stamp.position + max(1, self._interval_tokens // 4)
            else:
                progress.position = 0

    def is_held(self, sequence: Sequence) -> bool:
        """Whether the holder has a snapshot of it that was captured since `hurry`."""
        with self._lock:
            progress = self._progress.get(_key(sequence))
            return progress is not None and progress.is_last and progress.under_way is None

    def forget(self, sequence: Sequence) -> tuple[bool, frozenset[Holder]]:
        """Drop a sequence that has ended.

        Returns whether the holder may have something of it, and which earlier ones may.
        """
        with self._lock:
            former = frozenset(self._former.pop(_key(sequence), set()))
            progress = self._progress.pop(_key(sequence), None)
            if progress is not None and progress.under_way is not None:
                self._num_under_way -= 1
            has_some = progress is not None and bool(progress.position or progress.under_way)
            return has_some, former

    def _skip(self, sequence: Sequence, progress: _Progress) -> None:
        """Count a capture that is not taken: once an interval, not with every step."""
        first = sequence.num_prompt + self._interval_tokens
        if sequence.computed >= max(first, progress.skipped_from):
            self.num_skipped += 1
            progress.skipped_from = sequence.computed + self._interval_tokens

    def _is_wanted(self, sequence: Sequence, progress: _Progress) -> bool:
        if sequence.computed < progress.not_before:
            return False
        if self._is_urgent:
            return not progress.is_last
        return is_due(sequence.computed, progress.position, self._interval_tokens)

    def _arrived(self, stamp: Stamp, holder: Holder) -> _Progress | None:
        with self._lock:
            key = (stamp.request_id, stamp.sequence_index, stamp.assignment)
            progress = self._progress.get(key)
            if progress is None or progress.under_way != stamp.position or holder != self._holder:
                return None  # it has ended meanwhile, or another gateway keeps it now
            progress.under_way = None
            self._num_under_way -= 1
            return progress


def is_due(computed: int, position: int, interval_tokens: int) -> bool:
    """Whether a sequence is captured: so many tokens lie behind its newest snapshot."""
    return computed - position >= interval_tokens


def _key(sequence: Sequence) -> tuple[str, int, int]:
    return sequence.request.request_id, sequence.index, sequence.request.assignment
