"""A radix tree over token ids: whose KV is kept in which blocks, and where a state is kept too.

Edges are whole blocks, so a shared block is never written to. A node may have a checkpoint: the
recurrent state after exactly the tokens from the root to the node's end. A state between two block
boundaries hangs below the last one as a tail: less than a block of tokens with a block of its own,
which whoever uses it copies.

Blocks and checkpoints are forgotten apart, least recently used first. A node is used whenever one
below it is, so the least recently used one has none below it; a checkpoint is used only by itself.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from workers.gateway.kv import BlockPool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A kept state: where it lies, after how many tokens, and what that prefix is called."""

    place: int
    num_tokens: int
    digest: int


class Node:
    """Tokens below a parent, with their blocks. The root of a salt has neither."""

    __slots__ = ("blocks", "children", "parent", "salt", "tokens")

    def __init__(
        self, parent: "Node | None", salt: str, tokens: list[int], blocks: list[int]
    ) -> None:
        self.parent = parent
        self.salt = salt
        self.tokens = tokens
        self.blocks = blocks
        self.children: dict[tuple[int, ...], Node] = {}  # by their first block of tokens, or tail

    def path(self) -> Iterator["Node"]:
        """Yield this node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


@dataclass(frozen=True, slots=True)
class Match:
    """How much of some tokens is kept: `num_tokens` with KV, and the deepest usable state."""

    num_tokens: int
    node: Node | None = None  # with the state
    checkpoint: Checkpoint | None = None
    tail_block: int | None = None  # to be copied, when the state lies within a block

    @property
    def position(self) -> int:
        """Tokens that need not be computed again."""
        return 0 if self.checkpoint is None else self.checkpoint.num_tokens


class PrefixTree:
    """The tree of one gateway; each salt has a root of its own."""

    def __init__(self, kv: BlockPool, block_tokens: int, num_places: int) -> None:
        self.num_block_evictions = 0
        self.num_state_evictions = 0
        self._kv = kv
        self._block_tokens = block_tokens
        self._roots: dict[str, Node] = {}
        self._nodes: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self._checkpoints: OrderedDict[Node, Checkpoint] = OrderedDict()  # likewise
        self._places = list(range(num_places - 1, -1, -1))

    @property
    def num_states(self) -> int:
        """Checkpoints in all."""
        return len(self._checkpoints)

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Yield all checkpoints, most recently used first."""
        return reversed(self._checkpoints.values())

    def blocks(self, node: Node) -> list[int]:
        """Return the blocks from the root to the node's end."""
        return [block for above in reversed(list(node.path())) for block in above.blocks]

    def find(self, digest: int) -> Match | None:
        """Return the prefix of a name, if its state is kept."""
        for node, checkpoint in self._checkpoints.items():
            if checkpoint.digest == digest:
                return self._match(checkpoint.num_tokens, node, checkpoint)
        return None

    def tokens(self, node: Node) -> list[int]:
        """Return the tokens from the root to the node's end."""
        return [token for above in reversed(list(node.path())) for token in above.tokens]

    def match(self, salt: str, tokens: list[int], limit: int) -> Match:
        """Return how much of the tokens is kept, with the deepest state at most at `limit`."""
        node, depth = self._roots.get(salt), 0
        found: tuple[Node, Checkpoint] | None = None
        while node is not None:
            for candidate in (node, *self._tails(node, tokens, depth)):
                checkpoint = self._checkpoints.get(candidate)
                if checkpoint and checkpoint.num_tokens <= limit:
                    found = (candidate, checkpoint)  # deeper than those before
            child = node.children.get(tuple(tokens[depth : depth + self._block_tokens]))
            if child is None or len(child.tokens) < self._block_tokens:
                break
            shared = self._num_shared(child, tokens, depth)
            depth += shared
            node = child if shared == len(child.tokens) else None
        if found is None:
            return Match(depth)
        return self._match(depth, *found)

    def insert(self, salt: str, tokens: list[int], blocks: list[int]) -> Node:
        """Keep whole blocks, held by the caller; return the node at their end.

        Where the same tokens are kept already, their own blocks stay.
        """
        assert len(tokens) == len(blocks) * self._block_tokens
        node, depth = self._roots.setdefault(salt, Node(None, salt, [], [])), 0
        while depth < len(tokens):
            child = node.children.get(tuple(tokens[depth : depth + self._block_tokens]))
            if child is None:
                start = depth // self._block_tokens
                child = self._attach(node, tokens[depth:], blocks[start:])
            else:
                child = self._split(child, self._num_shared(child, tokens, depth))
            node, depth = child, depth + len(child.tokens)
        self._use(node)
        return node

    def insert_tail(self, node: Node, tokens: list[int], block: int) -> Node:
        """Keep less than a block of tokens below a node, for a state after them."""
        tail = node.children.get(tuple(tokens)) or self._attach(node, tokens, [block])
        self._use(tail)
        return tail

    def add_checkpoint(self, node: Node, num_tokens: int, digest: Callable[[], int]) -> int | None:
        """Return the place for the state at a node's end; None if it is kept already.

        When all places are taken, the least recently used state is forgotten.
        """
        if node in self._checkpoints:
            self._checkpoints.move_to_end(node)
            return None
        if not self._places:
            self.num_state_evictions += 1
            self._forget_state(next(iter(self._checkpoints)))
        place = self._places.pop()
        self._checkpoints[node] = Checkpoint(place, num_tokens, digest())
        return place

    def use(self, match: Match) -> None:
        """Note that a state is used, and all KV before it."""
        assert match.node is not None
        self._use(match.node)
        self._checkpoints.move_to_end(match.node)

    def reclaim(self, enough: Callable[[], bool]) -> None:
        """Drop idle blocks, least recently used first, until there is enough."""
        for node in list(self._nodes):
            if enough():
                return
            while node.blocks and not self._kv.is_held(node.blocks[-1]) and not enough():
                self._trim(node)

    def _use(self, node: Node) -> None:
        for above in node.path():
            self._nodes.move_to_end(above)

    def _tails(self, node: Node, tokens: list[int], depth: int) -> Iterator[Node]:
        """Yield the tails below a node that the tokens go through."""
        for end in range(depth + 1, min(depth + self._block_tokens, len(tokens) + 1)):
            tail = node.children.get(tuple(tokens[depth:end]))
            if tail is not None:
                yield tail

    def _match(self, num_tokens: int, node: Node, checkpoint: Checkpoint) -> Match:
        is_tail = len(node.tokens) < self._block_tokens
        return Match(num_tokens, node, checkpoint, node.blocks[0] if is_tail else None)

    def _num_shared(self, child: Node, tokens: list[int], depth: int) -> int:
        """Return how many of a child's tokens are the same, in whole blocks."""
        size = self._block_tokens
        low, middle, high = 0, len(child.blocks), len(child.blocks)
        while low < high:
            start, end = low * size, middle * size
            if child.tokens[start:end] == tokens[depth + start : depth + end]:
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low * size

    def _attach(self, parent: Node, tokens: list[int], blocks: list[int]) -> Node:
        node = Node(parent, parent.salt, tokens, blocks)
        self._kv.keep(node.blocks)
        parent.children[self._key(node)] = node
        self._nodes[node] = None
        return node

    def _split(self, node: Node, num_tokens: int) -> Node:
        """Return a node that ends after the first tokens of this one."""
        if num_tokens == len(node.tokens):
            return node
        assert node.parent is not None
        num_blocks = num_tokens // self._block_tokens
        upper = Node(node.parent, node.salt, node.tokens[:num_tokens], node.blocks[:num_blocks])
        node.parent.children[self._key(upper)] = upper
        del node.tokens[:num_tokens], node.blocks[:num_blocks]
        node.parent = upper
        upper.children[self._key(node)] = node
        self._nodes[upper] = None
        return upper

    def _key(self, node: Node) -> tuple[int, ...]:
        return tuple(node.tokens[: self._block_tokens])

    def _trim(self, node: Node) -> None:
        """Drop the last block of a node that has none below it."""
        assert not node.children
        self.num_block_evictions += 1
        if len(node.blocks) == 1:
            self._remove(node)
        else:
            self._drop_state(node)
            self._kv.drop([node.blocks.pop()])
            del node.tokens[-self._block_tokens :]

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        self._drop_state(node)
        self._kv.drop(node.blocks)
        del self._nodes[node], node.parent.children[self._key(node)]
        node.blocks.clear()
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.salt]

    def _forget_state(self, node: Node) -> None:
        """Forget a state; the KV stays, but for a tail's, which is of no use without it."""
        if len(node.tokens) < self._block_tokens:
            self._remove(node)
        else:
            self._drop_state(node)

    def _drop_state(self, node: Node) -> None:
        checkpoint = self._checkpoints.pop(node, None)
        if checkpoint is not None:
            self._places.append(checkpoint.place)
