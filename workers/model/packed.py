"""A rank's share of one sequence's cache as bytes: what travels and is stored. No tensors."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedShard:
    """The shard of rank `rank` of `size` at `position` committed tokens.

    `kv` holds the rows of positions `start` to `position`, row after row, in the compute dtype;
    `states` the convolution's window in the compute dtype, then the delta rule's states in float32.
    Shapes follow from the model's configuration. A rank whose KV heads another rank sends too has
    no KV rows.
    """

    rank: int
    size: int
    start: int
    position: int
    dtype: str
    kv: bytes
    states: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and states."""
        return len(self.kv) + len(self.states)

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's keys and values."""
        return len(self.kv) // max(self.position - self.start, 1)

    def digest(self) -> bytes:
        """Return a hash of everything in it; SHA-256, for which processors have instructions."""
        head = f"{self.rank}/{self.size}/{self.start}/{self.position}/{self.dtype}/{len(self.kv)}"
        found = hashlib.sha256(head.encode())
        found.update(self.kv)
        found.update(self.states)
        return found.digest()
