"""Snapshots of running sequences, as the gateways that keep them for each other see them: bytes.

A snapshot is the cache of one sequence at one committed position: one shard for each rank of the
gateway that wrote it. It is whole once all shards of one stamp are there.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from workers.model.packed import PackedShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a snapshot is of: the shards of all ranks carry the same.

    `position` tokens are in it; `tokens` is their hash. `assignment` says who owned the request.
    """

    request_id: str
    sequence_index: int
    assignment: int
    position: int
    weights_version: str
    tokens: bytes


@dataclass(frozen=True, slots=True)
class Holder:
    """The gateway that keeps the snapshots of another one: its identity, and where it listens."""

    member: str
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part of a snapshot on its way; `owner` is the gateway that wrote it."""

    stamp: Stamp
    owner: str
    data: PackedShard


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Snapshot:
    """A whole snapshot: the shards of all ranks in order, each with all rows from 0 on."""

    stamp: Stamp
    shards: tuple[PackedShard, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def is_of(self, request_id: str) -> bool:
        """Whether it was taken of this request; else it is what others have left of its prompt."""
        return self.stamp.request_id == request_id

    def fits(self, token_ids: Sequence[int], weights_version: str) -> bool:
        """Whether a sequence with these known tokens may go on from it.

        At least one token must be left to compute, from whose logits the next one is sampled.
        """
        stamp = self.stamp
        return (
            stamp.weights_version == weights_version
            and 0 < stamp.position < len(token_ids)
            and stamp.tokens == digest_of(token_ids[: stamp.position])
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence has left its gateway: what its holder has of it may be dropped.

    Unless it `has_ended`, it may go on elsewhere, and what is held is kept for a while.
    """

    request_id: str
    sequence_index: int
    assignment: int
    has_ended: bool


class Verdict(Enum):
    """What became of a shard at the gateway that is to keep it."""

    STORED = "stored"  # others of its snapshot are missing still
    COMPLETE = "complete"  # and with it the snapshot
    NO_BASE = "no base"  # the rows before its first one are not here: a full one is needed
    STALE = "stale"  # a newer assignment is known
    REFUSED = "refused"  # damaged, or larger than all that may be kept


def digest_of(token_ids: Sequence[int]) -> bytes:
    """Return a hash of tokens."""
    return hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=16).digest()


def snapshot_interval(tokens: int, state_bytes: int, token_bytes: int) -> int:
    """Return after how many tokens a sequence is captured again; 0 for never.

    That is `tokens`, or more where the recurrent states of one sequence, `state_bytes` on one rank,
    would otherwise cost more than `token_bytes` a token; 0 sets no such bound.
    """
    if tokens == 0 or token_bytes == 0:
        return tokens
    return max(tokens, -(-state_bytes // token_bytes))
