"""How sequences outlive their gateway: captured while they run, restored where they go on."""

from collections.abc import Callable, Mapping

from workers.gateway.capture import CaptureBook, CapturePrefix, Release, Restore
from workers.gateway.lockstep import CacheOperation
from workers.gateway.prefix_cache import KeptPrefix
from workers.gateway.sequence import Sequence
from workers.gateway.snapshot import Ended, Holder, Snapshot, Stamp, digest_of
from workers.types import FinishReason


class Survival:
    """What the engine does for the survival of its sequences. Called under the engine's lock.

    Args:
        book: Says what is to be captured.
        enqueue: Has all ranks do something to their caches between two steps.
    """

    def __init__(self, book: CaptureBook, enqueue: Callable[[CacheOperation], None]) -> None:
        self._book = book
        self._enqueue = enqueue
        self._snapshots: dict[Sequence, Snapshot] = {}  # of sequences that wait
        self._resumed: set[Sequence] = set()  # and were not admitted yet
        self.is_leaving = False
        self.restores = 0
        self.recomputes = 0
        self.replayed_tokens = 0
        self.recomputed_tokens = 0
        self.moved = 0
        self.fetches = 0
        self.fetched_tokens = 0

    def begin(self, sequence: Sequence, snapshot: Snapshot | None) -> None:
        """Hear of a new sequence, and of the snapshot that it may go on from."""
        if snapshot is not None and sequence.prompt_logprobs is None:  # those need every row
            self._snapshots[sequence] = snapshot
        if sequence.num_completion:
            self._resumed.add(sequence)

    def position(self, sequence: Sequence) -> int:
        """Return how many tokens of a waiting sequence are in a snapshot."""
        snapshot = self._snapshots.get(sequence)
        return 0 if snapshot is None else snapshot.stamp.position

    def restore(self, sequence: Sequence) -> int:
        """Have a sequence's blocks filled before its first step; return its computed tokens.

        A snapshot that is no longer than what the sequence begins with anyway is dropped.
        """
        snapshot = self._snapshots.pop(sequence, None)
        position = sequence.computed
        if snapshot is not None and snapshot.stamp.position > position:
            assert sequence.state_block is not None
            position = snapshot.stamp.position
            self._enqueue(
                Restore(
                    state_block=sequence.state_block,
                    kv_blocks=tuple(sequence.kv_blocks),
                    shards=snapshot.shards,
                )
            )
            self._count(sequence, snapshot)
        if sequence in self._resumed:
            self._resumed.discard(sequence)
            again = len(sequence.tokens) - position - 1  # the last token was never computed
            if sequence.is_restored:
                self.replayed_tokens += again
            else:
                self.recomputes += 1
                self.recomputed_tokens += again
        return position

    def send(self, kept: KeptPrefix, name: str, receiver: Holder) -> None:
        """Have all ranks send a prefix, under the name of a request that nobody makes."""
        stamp = Stamp(
            request_id=name,
            sequence_index=0,
            assignment=1,
            position=len(kept.token_ids),
            weights_version=self._book.weights_version,
            tokens=digest_of(kept.token_ids),
        )
        self._enqueue(
            CapturePrefix(stamp=stamp, holder=receiver, place=kept.place, kv_blocks=kept.kv_blocks)
        )
        # If the receiver has given it up, nobody else would tell it to free what comes.
        self._enqueue(Release(Ended(name, 0, stamp.assignment, has_ended=False), receiver))

    def advance(self, sequence: Sequence) -> None:
        """Capture a sequence that a step has advanced, if it is due."""
        capture = self._book.capture(sequence)
        if capture is not None:
            self._enqueue(capture)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Drop what there is of a sequence; its holder keeps it while it may move."""
        self._snapshots.pop(sequence, None)
        self._resumed.discard(sequence)
        holder = self._book.holder
        has_some, former = self._book.forget(sequence)
        request, goes_on = sequence.request, reason in {FinishReason.CANCELLED, FinishReason.MOVED}
        ended = Ended(request.request_id, sequence.index, request.assignment, not goes_on)
        if has_some and holder is not None and reason is not FinishReason.MOVED:
            former |= {holder}
        for each in sorted(former, key=lambda keeper: keeper.member):
            self._enqueue(Release(ended, each))

    def _count(self, sequence: Sequence, snapshot: Snapshot) -> None:
        """Take note of what a sequence goes on from."""
        if snapshot.is_of(sequence.request.request_id):
            sequence.is_restored = True
            self.restores += 1
            return
        sequence.cached_tokens = min(snapshot.stamp.position, sequence.num_prompt)
        self.fetches += 1
        self.fetched_tokens += snapshot.stamp.position

    def leave(self) -> None:
        """Capture everything once more: what is then held elsewhere goes on there."""
        self.is_leaving = True
        self._book.hurry()

    def movable(self, requests: Mapping[str, list[Sequence]]) -> list[Sequence]:
        """Return the unfinished sequences of requests that may go on elsewhere now."""
        if not self.is_leaving or self._book.holder is None:
            return []
        found = [
            sequence
            for sequences in requests.values()
            if all(s.finish is None for s in sequences)
            and all(s.state_block is None or self._book.is_held(s) for s in sequences)
            for sequence in sequences
        ]
        self.moved += len(found)
        return found
