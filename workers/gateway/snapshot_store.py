"""The snapshots that a gateway keeps for others, in host memory. Bytes and rules, no tensors.

Of each sequence and assignment the two newest whole snapshots are kept: their keys and values are
the same rows, only the states are there twice. A newer assignment's first whole snapshot ends the
older ones. What does not fit into the budget drives out what was cancelled, then what was written
longest ago; what does not fit alone is refused.
"""

import itertools
import threading
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from workers.clock import Clock
from workers.gateway.snapshot import Shard, Snapshot, Stamp, Verdict
from workers.model.packed import PackedShard

PENDING = 4  # of one sequence that lack ranks: more are those whose other ranks were not heard
KEPT = 2  # whole snapshots of one sequence: the newest may be ahead of what the client has

Key = tuple[str, int]  # request id, index of the sequence


@dataclass(slots=True)
class _Chain:
    """The snapshots of one sequence under one assignment.

    `pieces` are keys and values of all ranks, one piece after the other, up to the newest whole
    snapshot; `whole` has the states of each whole one, `pending` the shards of those that are not.
    """

    owner: str
    written_s: float
    released_s: float | None = None
    pieces: list[tuple[PackedShard, ...]] = field(default_factory=list)
    whole: dict[Stamp, tuple[PackedShard, ...]] = field(default_factory=dict)
    pending: dict[Stamp, dict[int, PackedShard]] = field(default_factory=dict)

    @property
    def position(self) -> int:
        """How many tokens the newest whole snapshot holds."""
        return self.pieces[-1][0].position if self.pieces else 0

    @property
    def num_bytes(self) -> int:
        shards = itertools.chain(
            *self.pieces, *self.whole.values(), *(p.values() for p in self.pending.values())
        )
        return sum(shard.num_bytes for shard in shards)

    @property
    def is_released(self) -> bool:
        """Whether it has left its gateway, as far as that can be; parts may still be coming."""
        return self.released_s is not None and bool(self.whole)

    def continued_by(self, data: PackedShard) -> bool:
        """Whether the rows before a shard's first one are here, written by as many ranks."""
        return data.start <= self.position and len(self.pieces[0]) == data.size

    def take(self, shard: Shard) -> Verdict:
        """Take a shard over that continues the chain."""
        by_rank = self.pending.setdefault(shard.stamp, {})
        by_rank[shard.data.rank] = shard.data
        if len(by_rank) < shard.data.size:
            for oldest in sorted(self.pending, key=lambda s: s.position)[:-PENDING]:
                del self.pending[oldest]
            return Verdict.STORED
        self._complete(shard.stamp, tuple(by_rank[rank] for rank in sorted(by_rank)))
        return Verdict.COMPLETE

    def snapshot(self, stamp: Stamp) -> Snapshot:
        """Return a whole snapshot with its rows."""
        columns = zip(*self.pieces, strict=True)
        return Snapshot(
            stamp=stamp,
            shards=tuple(
                replace(states, kv=b"".join(_until(p, stamp.position).kv for p in column))
                for states, column in zip(self.whole[stamp], columns, strict=True)
            ),
        )

    def _complete(self, stamp: Stamp, shards: tuple[PackedShard, ...]) -> None:
        start = shards[0].start
        before = [tuple(_until(p, start) for p in piece) for piece in self.pieces]
        kept = [piece for piece in before if piece[0].position > piece[0].start]
        self.pieces = [*kept, tuple(replace(shard, states=b"") for shard in shards)]
        self.whole[stamp] = tuple(replace(shard, start=0, kv=b"") for shard in shards)
        # Rows behind this position were just dropped, and with them what needs them.
        reached = [s for s in self.whole if s.position <= stamp.position]
        newest = sorted(reached, key=lambda s: s.position)[-KEPT:]
        self.whole = {s: self.whole[s] for s in newest}
        self.pending = {s: p for s, p in self.pending.items() if s.position > stamp.position}


def _until(piece: PackedShard, position: int) -> PackedShard:
    """Return the rows of a piece that lie before a position."""
    if piece.position <= position:
        return piece
    end = max(position, piece.start)
    return replace(piece, position=end, kv=piece.kv[: (end - piece.start) * piece.row_bytes])


class SnapshotStore:
    """Keeps snapshots for other gateways. May be called from any thread.

    Args:
        budget_bytes: Most that is kept.
        clock: Tells what is older.
        keep_s: For how long what was cancelled, or belongs to a gateway that has gone, is kept.

    Attributes:
        num_evicted: How often snapshots of a sequence that may be asked for had to go, or were not
            taken, for want of room; those of cancelled ones are kept only while there is room.
    """

    def __init__(self, budget_bytes: int, clock: Clock, *, keep_s: float = 120.0) -> None:
        self.budget_bytes = budget_bytes
        self._clock = clock
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._chains: dict[Key, dict[int, _Chain]] = {}  # by assignment
        self._num_bytes = 0
        self._gone_s: dict[str, float] = {}  # owners that have left, and since when
        self.num_evicted = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept now."""
        return self._num_bytes

    def put(self, shard: Shard) -> Verdict:
        """Take one rank's shard of a snapshot, whose digest the caller has checked."""
        stamp, data = shard.stamp, shard.data
        if not 0 <= data.rank < data.size:
            return Verdict.REFUSED
        if not self.admits(data.num_bytes):
            return Verdict.REFUSED
        key = (stamp.request_id, stamp.sequence_index)
        with self._lock:
            chains = self._chains.setdefault(key, {})
            if stamp.assignment < max(chains, default=0):
                return Verdict.STALE
            chain = chains.get(stamp.assignment)
            if data.start and (chain is None or not chain.continued_by(data)):
                self._drop_empty(key)
                return Verdict.NO_BASE
            now_s = self._clock.now_s()
            if chain is None:
                chain = chains[stamp.assignment] = _Chain(shard.owner, now_s)
            if not data.start:  # it is sent here anew, after it was sent elsewhere
                chain.released_s = None
            before = chain.num_bytes
            verdict = chain.take(shard)
            chain.written_s = now_s
            self._num_bytes += chain.num_bytes - before
            if verdict is Verdict.COMPLETE:
                for older in [a for a in chains if a < stamp.assignment]:
                    self._drop(key, older)
            return verdict if self._make_room(spare=(key, stamp.assignment)) else Verdict.REFUSED

    def admits(self, num_bytes: int) -> bool:
        """Whether a part of so many bytes may be kept at all; one that may not is counted."""
        if num_bytes <= self.budget_bytes:
            return True
        with self._lock:
            self.num_evicted += 1
        return False

    def is_whole(self, stamp: Stamp) -> bool:
        """Whether all shards of a snapshot have come, or of a later one."""
        with self._lock:
            chains = self._chains.get((stamp.request_id, stamp.sequence_index), {})
            chain = chains.get(stamp.assignment)
            return chain is not None and chain.position >= stamp.position

    def newest(self, request_id: str, sequence_index: int, num_tokens: int) -> Snapshot | None:
        """Return the newest whole snapshot that leaves one of `num_tokens` tokens to compute."""
        with self._lock:
            found = [
                (stamp.position, stamp.assignment, chain, stamp)
                for chain in self._chains.get((request_id, sequence_index), {}).values()
                for stamp in chain.whole
                if stamp.position < num_tokens
            ]
            if not found:
                return None
            *_, chain, stamp = max(found, key=lambda entry: entry[:2])
            return chain.snapshot(stamp)

    def release(self, key: Key, assignment: int, *, has_ended: bool) -> None:
        """Drop what is kept of a sequence that has ended, unless a newer assignment goes on.

        One that was cancelled may be on its way to another gateway: it is kept for a while.
        """
        now_s = self._clock.now_s()
        with self._lock:
            for number in [a for a in self._chains.get(key, ()) if a <= assignment]:
                if has_ended:
                    self._drop(key, number)
                else:
                    self._chains[key][number].released_s = now_s

    def sweep(self, owners: Collection[str]) -> None:
        """Hear which gateways there are; drop what nobody will ask for any more."""
        now_s = self._clock.now_s()
        with self._lock:
            chains = [(k, n, c) for k, by_n in self._chains.items() for n, c in by_n.items()]
            gone = {chain.owner for _, _, chain in chains}.difference(owners)
            self._gone_s = {owner: self._gone_s.get(owner, now_s) for owner in gone}
            for key, number, chain in chains:
                released_s = now_s if chain.released_s is None else chain.released_s
                since_s = min(released_s, self._gone_s.get(chain.owner, now_s))
                if now_s - since_s > self._keep_s:
                    self._drop(key, number)

    def _make_room(self, spare: tuple[Key, int]) -> bool:
        """Drop what is needed least until the rest fits; return whether the spared one does."""
        key, number = spare
        fits = self._chains[key][number].num_bytes <= self.budget_bytes
        if not fits:  # nothing that made way for it would help
            self._evict(key, number)
        while self._num_bytes > self.budget_bytes:
            ages = [
                (not chain.is_released, chain.written_s, key, number)
                for key, chains in self._chains.items()
                for number, chain in chains.items()
                if (key, number) != spare
            ]
            *_, key, number = min(ages)
            self._evict(key, number)
        return fits

    def _evict(self, key: Key, assignment: int) -> None:
        self.num_evicted += self._chains[key][assignment].released_s is None
        self._drop(key, assignment)

    def _drop(self, key: Key, assignment: int) -> None:
        self._num_bytes -= self._chains[key].pop(assignment).num_bytes
        self._drop_empty(key)

    def _drop_empty(self, key: Key) -> None:
        if not self._chains[key]:
            del self._chains[key]
