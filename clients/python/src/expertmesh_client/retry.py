"""What follows an attempt that failed: another one, where, and after how long; or an error.

Pure: told the time and given the chance, it looks at no clock and sleeps never.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import grpc

from expertmesh_client.errors import Failure, error_of

_CODE = grpc.StatusCode

# How grpc and proxies word a connection that broke, where they do not say UNAVAILABLE.
_LOSSES = (
    "rst_stream",
    "goaway",
    "stream removed",
    "socket closed",
    "connection reset",
    "connection closed",
    "broken pipe",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """For how long a call is sent again.

    The wait before an attempt is drawn between 0 and a bound that starts at `first_backoff_s`,
    doubles up to `max_backoff_s`, and starts again with every new token. A target that was not
    tried since the last token is tried at once. Failures are borne for `stall_s` without anything
    new, however many they are, unless `max_failures` bounds those in a row as well.

    An attempt lasts `stall_s` at most, and a call that got nothing new in one ends: so a call
    without a deadline ends at most twice `stall_s` after its last token. A lost connection may
    leave its request behind at the server for a while: for `duplicate_s` after the loss it is taken
    over from there.
    With `waits_for_room` a full queue is waited for as the server says, up to `stall_s`; without,
    it is an OverloadedError.
    """

    first_backoff_s: float = 0.05
    max_backoff_s: float = 5.0
    max_failures: int | None = None
    stall_s: float = 300.0
    duplicate_s: float = 60.0
    waits_for_room: bool = False


class _Kind(Enum):
    """What a failure says about another attempt."""

    LOST = "the connection or the server is gone; another attempt may succeed"
    DUPLICATE = "the server still holds the attempt that was lost"
    FULL = "there is no room now"
    LATE = "the attempt's time is over"
    FINAL = "another attempt would fail alike"


class Retries:
    """The attempts of one call.

    Args:
        policy: Its bounds.
        targets: Where the call may go.
        turn: Which of them is tried first, counted on past the last one.
        timeout_s: How long the whole call may take; None for no bound but the policy's.
        now_s: The time now.
        chance: Where the jitter comes from.
        request_id: What errors name.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        targets: Sequence[int],
        turn: int,
        timeout_s: float | None,
        now_s: float,
        chance: random.Random,
        request_id: str = "",
    ) -> None:
        self._policy = policy
        self._targets = targets
        self._turn = turn
        self._deadline_s = None if timeout_s is None else now_s + timeout_s
        self._chance = chance
        self._request_id = request_id
        self._progress_s = now_s
        self._failures = 0  # since there was something new
        self._lost_s: float | None = None
        self._attempt_has_progressed = False
        self._attempt_ends_at_deadline = False

    @property
    def target(self) -> int:
        """Where the next attempt goes."""
        return self._targets[self._turn % len(self._targets)]

    def begin(self, now_s: float) -> float:
        """Begin an attempt; return the seconds that it may take."""
        self._attempt_has_progressed = False
        stall_s = self._policy.stall_s
        left_s = stall_s if self._deadline_s is None else self._deadline_s - now_s
        self._attempt_ends_at_deadline = self._deadline_s is not None and left_s <= stall_s
        return max(0.0, min(left_s, stall_s))

    def progressed(self, now_s: float) -> None:
        """Note that there is something new."""
        self._attempt_has_progressed = True
        self._progress_s = now_s
        self._failures = 0

    def after(self, failure: Failure, now_s: float) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            ExpertmeshError: There is none.
        """
        match self._kind_of(failure, now_s):
            case _Kind.FINAL:
                raise error_of(failure, self._request_id)
            case _Kind.LATE:
                return self._after_late(failure, now_s)
            case _Kind.FULL:
                self._turn += 1
                delay_s = (failure.retry_after_s or 0.0) * self._chance.uniform(1.0, 1.25)
            case _Kind.DUPLICATE:
                self._failures += 1
                delay_s = self._backoff_s(self._failures)
            case _Kind.LOST:
                self._lost_s = now_s
                self._failures += 1
                self._turn += 1
                untried = len(self._targets) - self._failures
                delay_s = 0.0 if untried > 0 else self._backoff_s(1 - untried)
        self._check_bounds(failure, now_s + delay_s)
        return delay_s

    def _kind_of(self, failure: Failure, now_s: float) -> _Kind:
        match failure.code:
            case _CODE.UNAVAILABLE | _CODE.CANCELLED:  # this end has not cancelled it
                return _Kind.LOST
            case _CODE.INTERNAL | _CODE.UNKNOWN:
                message = failure.message.lower()
                return _Kind.LOST if any(loss in message for loss in _LOSSES) else _Kind.FINAL
            case _CODE.DEADLINE_EXCEEDED:
                return _Kind.LATE
            case _CODE.ALREADY_EXISTS if self._lost_s is not None:
                is_recent = now_s - self._lost_s <= self._policy.duplicate_s
                return _Kind.DUPLICATE if is_recent else _Kind.FINAL
            case _CODE.RESOURCE_EXHAUSTED if failure.retry_after_s is not None:
                return _Kind.FULL if self._policy.waits_for_room else _Kind.FINAL
            case _:
                return _Kind.FINAL

    def _after_late(self, failure: Failure, now_s: float) -> float:
        """Go on at once if the attempt brought something and the caller's time is not over."""
        if self._attempt_ends_at_deadline:
            raise error_of(failure, self._request_id)
        if not self._attempt_has_progressed:
            note = f"nothing new came for {self._policy.stall_s:g} s (RetryPolicy.stall_s)"
            raise error_of(failure, self._request_id, note)
        self._lost_s = now_s
        return 0.0

    def _check_bounds(self, failure: Failure, next_s: float) -> None:
        """Raise the failure if the next attempt would come too late, or is one too many."""
        policy, late = self._policy, grpc.StatusCode.DEADLINE_EXCEEDED
        if self._deadline_s is not None and next_s >= self._deadline_s:
            message = f"no time is left for another attempt; the last one: {failure.message}"
            raise error_of(Failure(code=late, message=message), self._request_id)
        if policy.max_failures is not None and self._failures > policy.max_failures:
            few = self._failures == 1
            note = "" if few else f"given up after {self._failures} failures in a row"
            raise error_of(failure, self._request_id, note)
        if next_s - self._progress_s > policy.stall_s:
            note = f"given up after {policy.stall_s:g} s without anything new"
            raise error_of(failure, self._request_id, note)

    def _backoff_s(self, number: int) -> float:
        """Return a wait drawn up to a bound that doubles with each number from 1 on."""
        doublings = min(number - 1, 32)  # no floats overflow by it
        bound_s = min(self._policy.max_backoff_s, self._policy.first_backoff_s * 2**doublings)
        return self._chance.uniform(0.0, bound_s)
