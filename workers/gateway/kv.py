"""Which KV blocks are free: ids only, the tensors are the cache's."""

from collections.abc import Iterable


class BlockPool:
    """A fixed number of blocks, each free or taken once. Freed blocks are taken again soonest."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that are taken now."""
        return len(self._taken)

    def take(self, num_blocks: int) -> list[int]:
        """Take blocks; the caller has made sure that so many are free."""
        assert num_blocks <= len(self._free), (num_blocks, len(self._free))
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self._taken.update(blocks)
        return blocks

    def give_back(self, blocks: Iterable[int]) -> None:
        """Free blocks that were taken; each exactly once."""
        for block in blocks:
            self._taken.remove(block)  # a KeyError here is a block that was freed twice
            self._free.append(block)


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """Return how many blocks of `block_tokens` positions hold `num_tokens`."""
    return -(-num_tokens // block_tokens)
