"""What every rank does to its cache between two steps for the sake of reuse; see `lockstep`."""

from dataclasses import dataclass
from typing import Protocol


class ReusableCache(Protocol):
    """What is needed of a `SequenceCache` here."""

    def save_state(self, state_block: int, place: int) -> None:
        """Copy a sequence's committed state to a checkpoint's place."""
        ...

    def load_state(self, place: int, state_block: int) -> None:
        """Copy a checkpoint into a state block; the checkpoint stays."""
        ...

    def copy_kv_block(self, source: int, target: int) -> None:
        """Copy all keys and values of a block."""
        ...


@dataclass(frozen=True, slots=True)
class SaveState:
    """Keep a sequence's state as a checkpoint."""

    state_block: int
    place: int

    def apply(self, cache: ReusableCache) -> None:
        """Do it."""
        cache.save_state(self.state_block, self.place)


@dataclass(frozen=True, slots=True)
class LoadState:
    """Let a sequence begin from a checkpoint."""

    place: int
    state_block: int

    def apply(self, cache: ReusableCache) -> None:
        """Do it."""
        cache.load_state(self.place, self.state_block)


@dataclass(frozen=True, slots=True)
class CopyKvBlock:
    """Give a sequence a block of its own with the contents of a kept one."""

    source: int
    target: int

    def apply(self, cache: ReusableCache) -> None:
        """Do it."""
        cache.copy_kv_block(self.source, self.target)


Operation = SaveState | LoadState | CopyKvBlock
