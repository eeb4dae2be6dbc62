"""Pick the sequences of a step, and which of their tokens to compute. Knows no tensors.

Decode rows come first, so that a long prompt never stalls anybody; what is left of the token budget
goes to prefill chunks, oldest sequence first; what is left then admits waiting sequences.

KV blocks for all known tokens are taken at admission, so only decoding sequences grow. Blocks that
only the prefix cache keeps are as good as free. When blocks run out, the newest running sequence is
preempted: it gives all its blocks back and is recomputed later. A sequence never preempts an older
one, it rather stalls with what it has. So the oldest always advances, and since a request that does
not fit alone is refused, all finish.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from workers.errors import FieldViolation, InvalidRequestError
from workers.gateway.kv import BlockPool, blocks_for
from workers.gateway.operations import Operation
from workers.gateway.prefix_cache import PrefixCache, PrefixOptions
from workers.gateway.prefix_tree import Match
from workers.gateway.sequence import Phase, Sequence
from workers.gateway.state import StateBlocks
from workers.model.batch import CHUNK_TOKENS, Segment
from workers.types import FinishReason, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Budgets of a step.

    `step_tokens` rows a step; at most `max_sequences` sequences run, each in one state block;
    `num_kv_blocks` blocks of `block_tokens` positions. With `bit_stable`, how a sequence is cut
    into segments does not depend on its company: one chunk of the prompt a segment, and completion
    tokens one at a time, also when they are computed again.
    """

    step_tokens: int
    max_sequences: int
    block_tokens: int
    num_kv_blocks: int
    bit_stable: bool = False
    prefix: PrefixOptions = field(default_factory=PrefixOptions)


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step."""

    sequence: Sequence
    segment: Segment


class Snapshots(Protocol):
    """What sequences may go on from that another gateway began."""

    def position(self, sequence: Sequence) -> int:
        """Return how many tokens of a waiting sequence are in a snapshot."""
        ...

    def restore(self, sequence: Sequence) -> int:
        """Fill the blocks of a sequence from its snapshot, if that brings it further.

        Returns how many of its tokens are in its blocks before its next step.
        """
        ...


class NoSnapshots:
    """A gateway to which no sequence comes from another one."""

    def position(self, sequence: Sequence) -> int:
        """Return 0."""
        return 0

    def restore(self, sequence: Sequence) -> int:
        """Leave the sequence as it is."""
        return sequence.computed


class Scheduler:
    """Owns which sequences wait and run, and the blocks that they hold.

    `enqueue` has every rank do something to its cache before the next step.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        snapshots: Snapshots | None = None,
        enqueue: Callable[[Operation], None] = lambda _: None,
    ) -> None:
        self._options = options
        self._snapshots = snapshots or NoSnapshots()
        self.kv = BlockPool(options.num_kv_blocks)
        self.states = StateBlocks(options.max_sequences)
        self.prefixes = PrefixCache(
            options.prefix,
            self.kv,
            enqueue,
            block_tokens=options.block_tokens,
            bit_stable=options.bit_stable,
        )
        self.num_preemptions = 0
        self._running: list[Sequence] = []  # oldest first
        self._returning: list[Sequence] = []  # oldest first
        self._fresh: deque[Sequence] = deque()

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_fresh(self) -> int:
        """Waiting sequences that were never admitted; only these can be too many."""
        return len(self._fresh)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, for the first time or again."""
        return len(self._fresh) + len(self._returning)

    def sequences(self) -> Iterator[Sequence]:
        """Yield every unfinished sequence."""
        yield from self._running
        yield from self._returning
        yield from self._fresh

    def check_fits(self, request: Request) -> None:
        """Refuse a request that could not run even alone.

        Raises:
            InvalidRequestError: Its longest sequence needs more KV blocks than there are.
        """
        options = self._options
        # The last token is sampled and never computed.
        longest = len(request.prompt_token_ids) + request.stopping.max_tokens - 1
        if blocks_for(longest, options.block_tokens) > options.num_kv_blocks:
            room = options.num_kv_blocks * options.block_tokens
            raise InvalidRequestError(
                FieldViolation(
                    "stopping.max_tokens",
                    f"prompt and completion need room for {longest} tokens, the gateway's KV "
                    f"cache holds {room}",
                )
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, ahead of those never admitted if it was begun elsewhere."""
        if sequence.returning:
            self._return(sequence)
        else:
            self._fresh.append(sequence)

    def schedule(self) -> list[Work]:
        """Return the work of the next step; empty when nothing can run.

        Takes blocks and preempts as needed. Sequences do not advance by this: that is `commit`'s.
        """
        budget = self._options.step_tokens
        work: list[Work] = []
        preemptions_before = self.num_preemptions
        for sequence in [s for s in self._running if s.phase is Phase.DECODING]:
            if budget > 0 and sequence.phase is Phase.DECODING and self._grow(sequence):
                work.append(Work(sequence, sequence.segment(1)))
                budget -= 1
        for sequence in [s for s in self._running if s.phase is Phase.PREFILLING]:
            budget -= self._prefill(sequence, budget, work)
        if self.num_preemptions > preemptions_before:
            return work  # what was just freed is for those that run
        while budget > 0 and (candidate := self._next_admissible()) is not None:
            self._admit(*candidate)
            num_tokens = self._prefill(candidate[0], budget, work)
            budget -= num_tokens
            if num_tokens == 0:
                break
        return work

    def advanced(self, sequence: Sequence) -> None:
        """Take note that what was scheduled of a sequence is committed."""
        self.prefixes.advanced(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it stands and free what it holds; keep what may be of use."""
        if sequence.state_block is not None:
            self._running.remove(sequence)
            self._release(sequence, is_sound=reason is not FinishReason.ERROR)
        elif sequence.returning:
            self._returning.remove(sequence)
        else:
            self._fresh.remove(sequence)
        sequence.finish = reason

    def _grow(self, sequence: Sequence) -> bool:
        """Take the blocks that a decoding sequence lacks; False when it must stall."""
        lacking = blocks_for(len(sequence.tokens), self._options.block_tokens) - len(
            sequence.kv_blocks
        )
        while lacking > self.kv.num_free + self.kv.num_idle:
            newest = self._running[-1]
            if newest is sequence:
                return False
            self._preempt(newest)
        if lacking > 0:
            self.prefixes.make_room(lacking)
            sequence.kv_blocks.extend(self.kv.take(lacking))
        return True

    def _prefill(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Append the sequence's next chunk, if the budget allows one; return its tokens."""
        num_tokens = min(sequence.pending, budget)
        if self._options.bit_stable:
            num_tokens = self._bit_stable_tokens(sequence, budget)
        num_tokens = self.prefixes.cut(sequence, num_tokens)
        if num_tokens > 0:
            work.append(Work(sequence, sequence.segment(num_tokens)))
        return num_tokens

    @staticmethod
    def _bit_stable_tokens(sequence: Sequence, budget: int) -> int:
        if sequence.computed >= sequence.num_prompt:
            return min(1, budget)
        chunk_end = (sequence.computed // CHUNK_TOKENS + 1) * CHUNK_TOKENS
        whole = min(chunk_end, sequence.num_prompt) - sequence.computed
        return whole if whole <= budget else 0

    def _next_admissible(self) -> tuple[Sequence, Match] | None:
        """Return the sequence at the head of the queue and what is kept of it, if there is room.

        Room means a block more than it needs for each sequence that runs already, so that it is
        not preempted again at once. Nobody overtakes the head, which so gets its turn.
        """
        if not self.num_waiting or not self.states.num_free:
            return None
        head = self._returning[0] if self._returning else self._fresh[0]
        match = self.prefixes.find(head)
        if self._snapshots.position(head) > match.position:
            match = Match(0)  # a snapshot is written to blocks of the sequence's own
        needed = self.prefixes.num_lacking_blocks(head, match) + len(self._running)
        has_room = needed <= self.kv.num_free + self.kv.num_idle or not self._running
        return (head, match) if has_room else None

    def _admit(self, sequence: Sequence, match: Match) -> None:
        if sequence.returning:
            self._returning.remove(sequence)
        else:
            self._fresh.popleft()
        sequence.returning = True
        sequence.state_block = self.states.take()
        self.prefixes.begin(sequence, match)
        sequence.computed = self._snapshots.restore(sequence)
        if sequence.computed > match.position and not sequence.is_restored:
            self.prefixes.fetched(sequence)
        insort(self._running, sequence, key=_age)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence, is_sound=True)
        sequence.computed = 0
        self._return(sequence)
        self.num_preemptions += 1

    def _return(self, sequence: Sequence) -> None:
        insort(self._returning, sequence, key=_age)

    def _release(self, sequence: Sequence, *, is_sound: bool) -> None:
        assert sequence.state_block is not None
        if is_sound:
            self.prefixes.ended(sequence)
        self.kv.give_back(sequence.kv_blocks)
        self.states.give_back(sequence.state_block)
        sequence.kv_blocks = []
        sequence.state_block = None
        self.prefixes.trim()


def _age(sequence: Sequence) -> int:
    return sequence.order
