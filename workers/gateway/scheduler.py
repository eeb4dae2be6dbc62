"""Pick the sequences of a step, and which of their tokens to compute. Knows no tensors.

Decode rows come first, so that a long prompt never stalls anybody; what is left of the token budget
goes to prefill chunks, oldest sequence first; what is left then admits waiting sequences.

KV blocks for all known tokens are taken at admission, so only decoding sequences grow. When blocks
run out, the newest running sequence is preempted: it gives all its blocks back and is recomputed
later. A sequence never preempts an older one, it rather stalls with what it has. So the oldest
always advances, and since a request that does not fit alone is refused, all finish.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from workers.errors import FieldViolation, InvalidRequestError
from workers.gateway.kv import BlockPool, blocks_for
from workers.gateway.sequence import Phase, Sequence
from workers.gateway.state import StateBlocks
from workers.model.batch import Segment
from workers.types import FinishReason, Request

CHUNK_TOKENS = (
    64  # of the delta rule's chunked form; in bit-stable mode chunks end at its multiples
)


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


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step."""

    sequence: Sequence
    segment: Segment


class Scheduler:
    """Owns which sequences wait and run, and the blocks that they hold.

    `restore` is asked about each sequence that has just been given its blocks: how many of its
    tokens are in them before its next step, out of a snapshot.
    """

    def __init__(
        self, options: SchedulerOptions, restore: Callable[[Sequence], int] = lambda _: 0
    ) -> None:
        self._options = options
        self._restore = restore
        self.kv = BlockPool(options.num_kv_blocks)
        self.states = StateBlocks(options.max_sequences)
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
            self._admit(candidate)
            num_tokens = self._prefill(candidate, budget, work)
            budget -= num_tokens
            if num_tokens == 0:
                break
        return work

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it stands and free what it holds."""
        if sequence.state_block is not None:
            self._running.remove(sequence)
            self._release(sequence)
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
        while lacking > self.kv.num_free:
            newest = self._running[-1]
            if newest is sequence:
                return False
            self._preempt(newest)
        sequence.kv_blocks.extend(self.kv.take(max(lacking, 0)))
        return True

    def _prefill(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Append the sequence's next chunk, if the budget allows one; return its tokens."""
        num_tokens = min(sequence.pending, budget)
        if self._options.bit_stable:
            num_tokens = self._bit_stable_tokens(sequence, budget)
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

    def _next_admissible(self) -> Sequence | None:
        """Return the sequence at the head of the queue, if there is room for it.

        Room means a block more than it needs for each sequence that runs already, so that it is
        not preempted again at once. Nobody overtakes the head, which so gets its turn.
        """
        if not self.num_waiting or not self.states.num_free:
            return None
        head = self._returning[0] if self._returning else self._fresh[0]
        needed = blocks_for(len(head.tokens), self._options.block_tokens)
        return (
            head if needed + len(self._running) <= self.kv.num_free or not self._running else None
        )

    def _admit(self, sequence: Sequence) -> None:
        if sequence.returning:
            self._returning.remove(sequence)
        else:
            self._fresh.popleft()
        sequence.returning = True
        sequence.state_block = self.states.take()
        needed = blocks_for(len(sequence.tokens), self._options.block_tokens)
        sequence.kv_blocks = self.kv.take(needed)
        sequence.computed = self._restore(sequence)
        insort(self._running, sequence, key=_age)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        self._return(sequence)
        self.num_preemptions += 1

    def _return(self, sequence: Sequence) -> None:
        insort(self._returning, sequence, key=_age)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.state_block is not None
        self.kv.give_back(sequence.kv_blocks)
        self.states.give_back(sequence.state_block)
        sequence.kv_blocks = []
        sequence.state_block = None


def _age(sequence: Sequence) -> int:
    return sequence.order
