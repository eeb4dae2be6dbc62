"""What sequences leave behind for later ones that begin alike, and what these find of it.

A hit is a state after exactly P tokens together with the KV of all of them. States are kept where
they will be of use: shortly before the end of a prompt (its very end is seldom met again, since
templates close a prompt differently once it is answered), where a prompt leaves one that was seen
before, at distances that double along a long prompt, and where a sequence ends or is put back.

In bit-stable mode a hit must give the bits of a miss. There a miss computes the prompt in chunks of
`CHUNK_TOKENS` from its begin, and completion tokens one at a time by another kernel. So only whole
chunks of prompts are kept, and found only within another prompt; what was decoded is computed
again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from workers.gateway.kv import BlockPool, blocks_for
from workers.gateway.operations import CopyKvBlock, LoadState, Operation, SaveState
from workers.gateway.prefix_digest import prefix_digest
from workers.gateway.prefix_tree import Match, Node, PrefixTree
from workers.gateway.sequence import Sequence
from workers.model.batch import CHUNK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOptions:
    """Budgets of the prefix cache; without places it is off.

    `num_places` states may be kept, and `max_idle_blocks` KV blocks beside those that running
    sequences hold; None for all that these leave free. A state is kept if it spares at least
    `least_gain_tokens`; along long prompts at `first_boundary_tokens` times a power of two.
    """

    num_places: int = 0
    max_idle_blocks: int | None = None
    least_gain_tokens: int = 64
    first_boundary_tokens: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPrefix:
    """Tokens whose KV lies in some blocks, and the state after all of them in a place."""

    token_ids: tuple[int, ...]
    place: int
    kv_blocks: tuple[int, ...]


@dataclass(slots=True)
class PrefixCounters:
    """What came of lookups; they only rise."""

    lookups: int = 0
    hits: int = 0
    hit_tokens: int = 0


class PrefixCache:
    """Decides what is kept; the scheduler asks and tells it of every sequence.

    `enqueue` has every rank do something to its cache, before the next step and in order.
    """

    def __init__(
        self,
        options: PrefixOptions,
        kv: BlockPool,
        enqueue: Callable[[Operation], None],
        *,
        block_tokens: int,
        bit_stable: bool,
    ) -> None:
        self.tree = PrefixTree(kv, block_tokens, options.num_places)
        self.counters = PrefixCounters()
        self._options = options
        self._kv = kv
        self._enqueue = enqueue
        self._block_tokens = block_tokens
        self._bit_stable = bit_stable
        self._align = lcm(block_tokens, CHUNK_TOKENS) if bit_stable else block_tokens

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self._options.num_places > 0

    def find(self, sequence: Sequence) -> Match:
        """Return what is kept of a sequence's tokens; changes nothing."""
        if not self.is_on:
            return Match(0)
        limit = len(sequence.tokens) - 1  # the last row's logits are needed
        if self._bit_stable:
            limit = min(limit, sequence.num_prompt)
        unscored = sequence.first_unscored_row
        limit = limit if unscored is None else min(limit, unscored)
        return self.tree.match(sequence.request.cache_salt, sequence.tokens, limit)

    def kept(self, digest: int) -> KeptPrefix | None:
        """Return what is kept of a prefix, by its name, for another gateway to begin with."""
        match = self.tree.find(digest)
        if match is None or match.node is None or match.checkpoint is None or self._bit_stable:
            return None
        self.tree.use(match)
        return KeptPrefix(
            token_ids=tuple(self.tree.tokens(match.node)),
            place=match.checkpoint.place,
            kv_blocks=tuple(self.tree.blocks(match.node)),
        )

    def num_lacking_blocks(self, sequence: Sequence, match: Match) -> int:
        """Return by how many blocks a sequence would leave less room if it began from a match."""
        shared = [] if match.node is None else self.tree.blocks(match.node)
        num_blocks = blocks_for(len(sequence.tokens), self._block_tokens)
        return num_blocks - sum(self._kv.is_held(block) for block in shared)

    def begin(self, sequence: Sequence, match: Match) -> None:
        """Give a sequence its blocks, and let it begin where a match ends; plan what to keep."""
        assert sequence.state_block is not None
        shared = self._share(match)
        num_lacking = blocks_for(len(sequence.tokens), self._block_tokens) - len(shared)
        self.make_room(num_lacking)
        sequence.kv_blocks = shared + self._kv.take(num_lacking)
        sequence.computed = match.position
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(match.position, sequence.num_prompt)
        # What was dropped above is still in its place, until an operation that comes later.
        if match.tail_block is not None:
            self._enqueue(CopyKvBlock(match.tail_block, sequence.kv_blocks[len(shared)]))
        if match.checkpoint is not None:
            self._enqueue(LoadState(match.checkpoint.place, sequence.state_block))
        if self.is_on:
            sequence.cuts = self._plan(sequence, match)
            self.counters.lookups += 1

    def cut(self, sequence: Sequence, num_tokens: int) -> int:
        """Return how many of the next tokens to compute, so that a planned state can be kept."""
        distances = [cut - sequence.computed for cut in sequence.cuts]
        return min([num_tokens, *(d for d in distances if d > 0)])

    def advanced(self, sequence: Sequence) -> None:
        """Keep the state of a running sequence that stands where one was planned."""
        if sequence.computed in sequence.cuts and self._keeps(sequence):
            self._keep(sequence, sequence.computed)

    def fetched(self, sequence: Sequence) -> None:
        """Keep what another gateway has sent of a prompt, where its last block is full."""
        if self._keeps(sequence) and sequence.computed % self._block_tokens == 0:
            self._keep(sequence, sequence.computed)

    def ended(self, sequence: Sequence) -> None:
        """Keep what a sequence leaves, before it gives back its blocks."""
        if not self._keeps(sequence) or not sequence.computed:
            return
        end = sequence.computed
        if self._bit_stable:
            end = min(end, sequence.num_prompt) // self._align * self._align
        found = self.tree.match(sequence.request.cache_salt, sequence.tokens, end)
        is_worth_it = end - found.position >= self._options.least_gain_tokens
        if end == sequence.computed and is_worth_it:
            self._keep(sequence, end)
        elif end >= self._block_tokens:
            self._insert(sequence, end)

    def make_room(self, num_blocks: int) -> None:
        """Drop what is needed least until so many blocks are free, or nothing is left to drop."""
        self.tree.reclaim(lambda: self._kv.num_free >= num_blocks)

    def trim(self) -> None:
        """Drop what is beyond the budget of idle blocks."""
        most = self._options.max_idle_blocks
        if most is not None:
            self.tree.reclaim(lambda: self._kv.num_idle <= most)

    def _keeps(self, sequence: Sequence) -> bool:
        """Whether what a sequence leaves is kept.

        In bit-stable mode not if another gateway has computed it, which may have other ranks.
        """
        return self.is_on and not (self._bit_stable and sequence.is_restored)

    def _share(self, match: Match) -> list[int]:
        """Hold and return the whole blocks before a match's end."""
        if match.node is None:
            return []
        self.tree.use(match)
        self.counters.hits += 1
        self.counters.hit_tokens += match.position
        blocks = self.tree.blocks(match.node)[: match.position // self._block_tokens]
        self._kv.hold(blocks)
        return blocks

    def _plan(self, sequence: Sequence, match: Match) -> tuple[int, ...]:
        """Return after which tokens of a sequence's prefill states are worth keeping."""
        gain, options = self._options.least_gain_tokens, self._options
        num_tokens = sequence.num_prompt if self._bit_stable else len(sequence.tokens)
        last = (num_tokens - 1) // self._align * self._align
        junction = match.num_tokens // self._align * self._align
        wanted = [last, junction]
        boundary = -(-options.first_boundary_tokens // self._align) * self._align
        for _ in range(options.num_places // 4):  # the rest is for other prompts
            wanted.append(boundary)
            boundary *= 2
        chosen: list[int] = []
        for position in wanted:
            distances = [abs(position - other) for other in (match.position, *chosen)]
            if match.position < position <= last and min(distances) >= gain:
                chosen.append(position)
        return tuple(chosen)

    def _keep(self, sequence: Sequence, end: int) -> None:
        """Keep KV and state of the first tokens; the state is the sequence's own."""
        assert end == sequence.computed
        assert sequence.state_block is not None
        node = self._insert(sequence, end)
        num_whole = end // self._block_tokens * self._block_tokens
        if end > num_whole:
            block = sequence.kv_blocks[blocks_for(end, self._block_tokens) - 1]
            node = self.tree.insert_tail(node, sequence.tokens[num_whole:end], block)
        salt = sequence.request.cache_salt
        place = self.tree.add_checkpoint(
            node, end, lambda: prefix_digest(salt, sequence.tokens[:end])
        )
        if place is not None:
            self._enqueue(SaveState(sequence.state_block, place))

    def _insert(self, sequence: Sequence, end: int) -> Node:
        """Keep the whole blocks of the first tokens; what was kept already replaces the own."""
        num_blocks = end // self._block_tokens
        own = sequence.kv_blocks[:num_blocks]
        node = self.tree.insert(
            sequence.request.cache_salt, sequence.tokens[: num_blocks * self._block_tokens], own
        )
        kept = self.tree.blocks(node)
        self._kv.hold(kept)
        self._kv.give_back(own)
        sequence.kv_blocks[:num_blocks] = kept
        return node
