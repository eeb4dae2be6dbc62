"""How the ranks of one gateway take their steps together: rank 0 leads, the others follow.

Rank 0 sends every batch with the outcome of the batch before it; until then the followers keep
what that one staged. What else is to be done to the caches of all ranks, such as to copy a state
aside, goes along and is done in between: after that outcome, before the batch. A step whose forward
raised may be tried again only if it raised on every rank: if some rank got further, their
collectives no longer match, and the gateway is at its end.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from workers.errors import GatewayFailedError
from workers.model.batch import StepBatch

Forward = Callable[[StepBatch], Tensor]
Take = Callable[[Any], None]  # what operations on this rank's cache have returned


class StagedStates(Protocol):
    """What a step leaves behind until it is decided."""

    def commit(self) -> None:
        """Make the staged states visible."""
        ...

    def discard(self) -> None:
        """Drop the staged states."""
        ...


class CacheOperation(Protocol):
    """Something that every rank does to its own cache between two steps; sent as it is."""

    def apply(self, cache: Any, /) -> object:  # noqa: ANN401 - a `SequenceCache`, or a fake
        """Do it; what it returns is the rank's to take.

        What it raises ends the gateway: its ranks would no longer be alike.
        """
        ...


class Group(Protocol):
    """What is needed of the tensor-parallel group here."""

    size: int

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Send rank 0's bytes to all ranks."""
        ...


class FailureVote(Protocol):
    """Finds out whether a step failed on every rank."""

    def is_unanimous(self, number: int) -> bool:
        """Report this rank's failure of one step and return whether all ranks reported it."""
        ...


class KeyStore(Protocol):
    """What is needed of a `torch.distributed` store here."""

    def set(self, key: str, value: str, /) -> None:
        """Store a value."""
        ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Return when all keys are there; RuntimeError at the deadline."""
        ...


def drop(_result: object) -> None:
    """Take nothing of what operations return."""


class LoneVote:
    """The vote of a gateway with one rank."""

    def is_unanimous(self, number: int) -> bool:
        """Return True."""
        return True


class StoreVote:
    """Ranks report failures in the group's store; costs nothing while nothing fails."""

    def __init__(self, store: KeyStore, rank: int, size: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._timeout = timedelta(seconds=timeout_s)

    def is_unanimous(self, number: int) -> bool:
        """Report, then wait for the others' reports until the deadline."""
        keys = [f"failed/{number}/{rank}" for rank in range(self._size)]
        try:
            self._store.set(keys[self._rank], "failed")
            self._store.wait(keys, self._timeout)  # all ranks report; ends by the deadline
        except RuntimeError:  # the deadline, or the rank that hosts the store is gone
            return False
        return True


class Outcome(Enum):
    """What becomes of what the batch before staged."""

    NOTHING = "nothing"  # it is decided, or there was none
    COMMIT = "commit"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    """What rank 0 tells the others: the last step's outcome, what comes between, the next step."""

    number: int
    outcome: Outcome
    operations: tuple[CacheOperation, ...] = ()
    batch: StepBatch
    is_last: bool = False


class Leader:
    """Rank 0's side. Each `compute` that returns is followed by `commit` or `discard`."""

    def __init__(
        self,
        group: Group,
        forward: Forward,
        cache: StagedStates,
        vote: FailureVote,
        take: Take = drop,
    ) -> None:
        self._group = group
        self._forward = forward
        self._cache = cache
        self._vote = vote
        self._take = take
        self._number = 0
        self._outcome = Outcome.NOTHING
        self._operations: list[CacheOperation] = []

    def enqueue(self, operation: CacheOperation) -> None:
        """Have every rank do something to its cache before its next step."""
        self._operations.append(operation)

    def compute(self, batch: StepBatch) -> Tensor:
        """Run one batch on all ranks and return its logits; what it stages is undecided.

        Raises:
            GatewayFailedError: A rank is gone, or the ranks are out of step.
            Exception: Whatever the forward raised, on every rank; its states are discarded.
        """
        self._send(batch)
        try:
            return self._forward(batch)
        except Exception as error:
            self.discard()
            if not self._vote.is_unanimous(self._number):
                raise GatewayFailedError(f"a step failed on some ranks only: {error!r}") from error
            raise

    def commit(self) -> None:
        """Make the last batch's states visible: here now, elsewhere before the next step."""
        self._cache.commit()
        self._outcome = Outcome.COMMIT

    def discard(self) -> None:
        """Drop the last batch's states."""
        self._cache.discard()
        self._outcome = Outcome.DISCARD

    def idle(self) -> None:
        """Tell the others that rank 0 lives, and what is left to do; see whether they live."""
        self._send(StepBatch())

    def stop(self) -> None:
        """End the others' loops."""
        self._send(StepBatch(), is_last=True)

    def _send(self, batch: StepBatch, *, is_last: bool = False) -> None:
        self._number += 1
        outcome, self._outcome = self._outcome, Outcome.NOTHING
        operations, self._operations = tuple(self._operations), []
        if self._group.size > 1:
            message = StepMessage(
                number=self._number,
                outcome=outcome,
                operations=operations,
                batch=batch,
                is_last=is_last,
            )
            try:
                self._group.broadcast_bytes(pickle.dumps(message))
            except RuntimeError as error:
                raise GatewayFailedError(f"a rank of this gateway is gone: {error}") from error
        _apply(operations, self._cache, self._take)


class Follower:
    """The side of ranks 1 and up."""

    def __init__(
        self,
        group: Group,
        forward: Forward,
        cache: StagedStates,
        vote: FailureVote,
        take: Take = drop,
    ) -> None:
        self._group = group
        self._forward = forward
        self._cache = cache
        self._vote = vote
        self._take = take

    def follow(self) -> bool:
        """Take part in one step of rank 0's; return whether there is another.

        Raises:
            GatewayFailedError: Rank 0 is gone, or the ranks are out of step.
        """
        try:
            payload = self._group.broadcast_bytes(None)
        except RuntimeError as error:
            raise GatewayFailedError(f"rank 0 of this gateway is gone: {error}") from error
        message: StepMessage = pickle.loads(payload)  # noqa: S301 - from our own rank 0
        if message.outcome is Outcome.COMMIT:
            self._cache.commit()
        elif message.outcome is Outcome.DISCARD:
            self._cache.discard()
        _apply(message.operations, self._cache, self._take)
        if message.batch.segments:
            self._compute(message)
        return not message.is_last

    def _compute(self, message: StepMessage) -> None:
        try:
            self._forward(message.batch)
        except Exception as error:
            if not self._vote.is_unanimous(message.number):
                raise GatewayFailedError(f"a step failed on some ranks only: {error!r}") from error


def _apply(operations: tuple[CacheOperation, ...], cache: StagedStates, take: Take) -> None:
    for operation in operations:
        try:
            result = operation.apply(cache)
            if result is not None:
                take(result)
        except Exception as error:
            raise GatewayFailedError(f"{type(operation).__name__} failed: {error!r}") from error
