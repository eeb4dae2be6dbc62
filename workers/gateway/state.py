"""Which state blocks are free: the places of recurrent states, one for each running sequence."""

from workers.gateway.kv import BlockPool


class StateBlocks:
    """A fixed number of state blocks; what a block held before needs no clearing.

    A sequence at position 0 begins from zero state whatever its block held (see `Segment`).
    """

    def __init__(self, num_blocks: int) -> None:
        self._pool = BlockPool(num_blocks)

    @property
    def num_blocks(self) -> int:
        """State blocks in all."""
        return self._pool.num_blocks

    @property
    def num_used(self) -> int:
        """State blocks that are taken now."""
        return self._pool.num_used

    @property
    def num_free(self) -> int:
        """State blocks that can be taken now."""
        return self._pool.num_free

    def take(self) -> int:
        """Take one block; the caller has made sure that one is free."""
        return self._pool.take(1)[0]

    def give_back(self, block: int) -> None:
        """Free one block that was taken."""
        self._pool.give_back((block,))
