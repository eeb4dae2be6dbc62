"""Which KV blocks are free, held and kept: ids only, the tensors are the cache's."""

from collections.abc import Iterable


class BlockPool:
    """A fixed number of blocks. Freed blocks are taken again soonest.

    A block is held by any number of sequences, of which all but the one that took it only read it;
    and it may be kept beside that by the prefix cache. It is free when nobody holds or keeps it,
    and idle when it is kept and not held: idle blocks can be had back by dropping them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders: dict[int, int] = {}
        self._kept: set[int] = set()
        self._num_idle = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence holds."""
        return len(self._holders)

    @property
    def num_kept(self) -> int:
        """Blocks that the prefix cache keeps, held or not."""
        return len(self._kept)

    @property
    def num_idle(self) -> int:
        """Blocks that are kept and not held."""
        return self._num_idle

    def is_held(self, block: int) -> bool:
        """Whether some sequence holds the block."""
        return block in self._holders

    def take(self, num_blocks: int) -> list[int]:
        """Take free blocks; the caller has made sure that there are so many."""
        assert num_blocks <= len(self._free), (num_blocks, len(self._free))
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold blocks that are held or kept already, to read them."""
        for block in blocks:
            holders = self._holders.get(block, 0)
            assert holders or block in self._kept, block
            self._num_idle -= not holders
            self._holders[block] = holders + 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """No longer hold blocks; each once for each time that it was taken or held."""
        for block in blocks:
            holders = self._holders.pop(block)  # a KeyError here is a block that was freed twice
            if holders > 1:
                self._holders[block] = holders - 1
            elif block in self._kept:
                self._num_idle += 1
            else:
                self._free.append(block)

    def keep(self, blocks: Iterable[int]) -> None:
        """Keep blocks that are held, also when nobody holds them any more."""
        for block in blocks:
            assert block in self._holders, block
            assert block not in self._kept, block
            self._kept.add(block)

    def drop(self, blocks: Iterable[int]) -> None:
        """No longer keep blocks."""
        for block in blocks:
            self._kept.remove(block)
            if block not in self._holders:
                self._num_idle -= 1
                self._free.append(block)


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """Return how many blocks of `block_tokens` positions hold `num_tokens`."""
    return -(-num_tokens // block_tokens)
