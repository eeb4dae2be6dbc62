"""What became of one dispatched layer: attempts, replies, and what must be sent again. Pure.

The pairs (row, expert) of a layer are covered by *attempts*, one message each. Attempts are
alternatives: what an attempt leaves open, because its link broke, its worker answered STALE or it
is overdue, becomes a *group* of new attempts that cover exactly those pairs. So a cover is complete
and disjoint by construction: an attempt's own reply, together with a group for what it left out,
or else one of its groups. The first complete cover wins whole; what comes later is dropped. A call
also ends, without a cover, with a row that workers end by (`suspects`).

No thread, no clock, no tensor: time and replies are arguments, a payload is anything. The
exchange runs this over links, the simulator over a simulated network.
"""

import bisect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.dispatch.row_pairs import Pairs
from workers.dispatch.suspects import Suspects
from workers.placement import MemberId
from workers.types import RECOVERY_BOUNDS_S

_NEWCOMER = 4.0  # times another's deadline: its first calls find nothing in the caches


@dataclass(slots=True, eq=False)
class Attempt:
    """One message to one worker over one incarnation of its link."""

    message_id: int
    worker: MemberId
    incarnation: int
    pairs: Pairs
    number: int
    sent_s: float
    allowed_s: float  # how long the worker may take once it is sent
    deadline_s: float
    is_alone: bool = False  # its row is a suspect: whoever computes it computes nothing else
    is_sent: bool = False  # false while it awaits a buffer
    payload: Any = None  # what `reply` was given
    answered: bool = False
    lost: bool = False
    covered: bool = False
    group: "Group | None" = None
    groups: list["Group"] = field(default_factory=list)
    winner: "Group | None" = None  # what covers it, or what its own reply left out

    @property
    def needed(self) -> bool:
        """Whether its reply can still become part of the result."""
        return not self.covered and (self.group is None or self.group.needed)


@dataclass(slots=True, eq=False)
class Group:
    """One way to cover some pairs: attempts, and what awaits a worker (`waiting`)."""

    waiting: Pairs | None
    number: int = 1
    parent: Attempt | None = None
    attempts: list[Attempt] = field(default_factory=list)
    num_open: int = 0
    dropped: bool = False

    @property
    def covered(self) -> bool:
        """Whether every pair of the group is summed by exactly one reply in hand."""
        return self.waiting is None and self.num_open == 0

    @property
    def needed(self) -> bool:
        """Whether it can still become part of the result."""
        return not self.dropped and (self.parent is None or self.parent.needed)


class LayerCall:
    """The state of one dispatched layer (of one micro-batch)."""

    def __init__(self, layer: int, pairs: Pairs) -> None:
        self.layer = layer
        self.root = Group(waiting=pairs)
        self.outstanding: dict[int, Attempt] = {}
        self.accepted: list[Attempt] = []
        self.complete = False
        self.disturbed = False  # something was lost, left out or hedged
        self.suspects = Suspects()
        self._newest = 0  # message
        self._unplanned: list[Group] = [self.root]

    def needs(self) -> list[Group]:
        """Return the groups with waiting pairs: to be planned now, or parked."""
        if not self._unplanned or self.complete:
            return []
        self._unplanned = [g for g in self._unplanned if g.waiting is not None and g.needed]
        return list(self._unplanned)

    def place(self, group: Group, attempts: Sequence[Attempt], rest: Pairs | None) -> None:
        """Record that waiting pairs are on their way; `rest` stays parked."""
        group.waiting = rest
        for attempt in attempts:
            attempt.group = group
            group.attempts.append(attempt)
            group.num_open += 1
            self.outstanding[attempt.message_id] = attempt
            self._newest = attempt.message_id
        if group.covered:  # there was nothing to send
            self._settle(group)

    def reply(
        self,
        message_id: int,
        worker: MemberId,
        incarnation: int,
        summed_R: NDArray[np.uint32],
        payload: object,
    ) -> Attempt | None:
        """Take a reply; returns its attempt when it was accepted, None when it must be dropped.

        Accepted iff the attempt is outstanding on this incarnation of the link, its pairs are not
        covered otherwise, and the reply sums nothing that was not asked for. What it left out is
        waiting afterwards; the payload of a reply that sums nothing is not kept.
        """
        attempt = self.outstanding.get(message_id)
        if attempt is None or attempt.worker != worker or attempt.incarnation != incarnation:
            return None
        asked_R = attempt.pairs.masks_R
        whole = summed_R.tobytes() == asked_R.tobytes()  # on few rows the quickest comparison
        if self.complete or not attempt.needed or (not whole and (summed_R & ~asked_R).any()):
            return None
        if not summed_R.any():
            self.give_up(attempt)  # it holds none of what was asked for
            return attempt
        del self.outstanding[message_id]
        attempt.answered = True
        attempt.payload = payload
        self.accepted.append(attempt)
        if whole:
            self._cover(attempt)
        else:
            for group in attempt.groups:  # a cover of all of it no longer goes with this reply
                group.dropped = True
            self._add_group(attempt, attempt.pairs.only(asked_R & ~summed_R))
        return attempt

    def link_lost(
        self, worker: MemberId, incarnation: int, computing: int | None = None
    ) -> list[Attempt]:
        """Give up what is outstanding on a link; its pairs are waiting afterwards.

        `computing` is the message that the worker had begun to compute alone when it ended, None
        when there is none or it did not end. A row of which that has been shown often enough ends
        the call: it is complete, and its sums mean nothing.
        """
        lost = [
            a for a in self.outstanding.values()
            if a.worker == worker and a.incarnation == incarnation
        ]  # fmt: skip
        for attempt in lost:
            if attempt.is_sent and attempt.needed:  # else others had it too, and go on
                self.suspects.lost(worker, attempt.pairs)
                if attempt.message_id == computing:
                    self.suspects.shown(worker, attempt.pairs, computing, self._newest)
            self.give_up(attempt)
        if self.suspects.given_up:
            self.complete = True
        return lost

    def give_up(self, attempt: Attempt) -> None:
        """Give up one outstanding attempt, unless something still stands in for it."""
        self.outstanding.pop(attempt.message_id, None)
        attempt.lost = True
        if self.complete or not attempt.needed or any(not g.dropped for g in attempt.groups):
            return
        group = attempt.group
        assert group is not None
        if group.parent is not None and not group.parent.answered and not group.parent.lost:
            group.dropped = True  # a hedge that failed: its original is still awaited,
            group.parent.deadline_s = -math.inf  # and overdue at once: somebody else may have it
        elif group.waiting is None:  # as if never sent: else a long wait would nest ever deeper
            group.attempts.remove(attempt)
            group.num_open -= 1
            group.waiting, group.number = attempt.pairs, attempt.number + 1
            self.disturbed = True
            if group not in self._unplanned:
                self._unplanned.append(group)
        else:
            self._add_group(attempt, attempt.pairs)

    def awaits(self, attempt: Attempt) -> bool:
        """Whether the reply to an attempt can still become part of the result."""
        return not self.complete and not attempt.lost and attempt.needed

    def overdue(self, now_s: float) -> list[Attempt]:
        """Return the outstanding attempts whose deadline has passed."""
        if self.complete:
            return []
        return [a for a in self.outstanding.values() if a.deadline_s <= now_s and a.needed]

    def next_deadline_s(self) -> float:
        """Return when the next attempt is overdue; infinity when none is awaited."""
        if self.complete:
            return math.inf
        return min((a.deadline_s for a in self.outstanding.values() if a.needed), default=math.inf)

    def hedge(self, attempt: Attempt) -> Group:
        """Open a second way to cover an outstanding attempt; whichever is complete first wins."""
        return self._add_group(attempt, attempt.pairs)

    def cover(self) -> Iterator[Attempt]:
        """Yield the attempts whose replies make the result, in the order of sending.

        Where a row was given up there is no result, and what has come is yielded.
        """
        assert self.complete
        yield from _cover_of(self.root)

    def _add_group(self, attempt: Attempt, pairs: Pairs) -> Group:
        group = Group(waiting=pairs, number=attempt.number + 1, parent=attempt)
        attempt.groups.append(group)
        self.disturbed = True
        self._unplanned.append(group)
        return group

    def _cover(self, attempt: Attempt) -> None:
        attempt.covered = True
        group = attempt.group
        assert group is not None
        group.num_open -= 1
        if group.covered:
            self._settle(group)

    def _settle(self, group: Group) -> None:
        if group.parent is None:
            self.complete = True
        else:
            group.parent.winner = group
            self._cover(group.parent)


def _cover_of(group: Group) -> Iterator[Attempt]:
    for attempt in group.attempts:
        if attempt.answered:
            yield attempt
        if attempt.winner is not None:
            yield from _cover_of(attempt.winner)


class AnswerTimes:
    """How long a worker takes to answer, by size of call; gives its deadline.

    The deadline is `factor` times the 99th percentile of the last 128 answers of that size class
    (powers of two of rows), at least `least_s`. Before the first eight it is a few times what was
    last learned of another worker, and at most `first_s`.

    `lately_s` is shared by all workers: the newest deadline of each size class, of any of them.
    """

    def __init__(
        self, *, factor: float, least_s: float, first_s: float, lately_s: dict[int, float]
    ) -> None:
        self._factor = factor
        self._least_s = least_s
        self._first_s = first_s
        self._lately_s = lately_s
        self._taken_s: dict[int, deque[float]] = {}
        self._num_answers: dict[int, int] = {}
        self._deadline_s: dict[int, float] = {}

    def record(self, num_rows: int, taken_s: float) -> None:
        """Add an answer."""
        size = num_rows.bit_length()
        taken = self._taken_s.setdefault(size, deque(maxlen=128))
        taken.append(taken_s)
        count = self._num_answers[size] = self._num_answers.get(size, 0) + 1
        if count == 8 or count % 32 == 0:
            p99_s = sorted(taken)[(len(taken) - 1) * 99 // 100]
            deadline_s = max(self._least_s, self._factor * p99_s)
            self._deadline_s[size] = self._lately_s[size] = deadline_s

    def deadline_s(self, num_rows: int) -> float:
        """Return how long a call of this many rows may take before its worker is suspect."""
        size = num_rows.bit_length()
        known_s = self._deadline_s.get(size)
        if known_s is not None:
            return known_s
        return min(self._first_s, _NEWCOMER * self._lately_s.get(size, self._first_s))


class HedgeBudget:
    """Limits hedges to a share of the messages, beyond a handful to begin with."""

    def __init__(self, share: float, first: int = 16) -> None:
        self._share = share
        self._first = first
        self._num_hedges = 0

    def take(self, num_messages: int) -> bool:
        """Whether one more hedge is within the budget after so many messages; counts it if so."""
        allowed = self._num_hedges < self._first + self._share * num_messages
        self._num_hedges += allowed
        return allowed


class Recoveries:
    """Counts how long layers took to be complete after a loss was noticed; see `GatewayStats`."""

    def __init__(self) -> None:
        self.counts = [0] * (len(RECOVERY_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def record(self, taken_s: float) -> None:
        """Add one layer."""
        self.counts[bisect.bisect_left(RECOVERY_BOUNDS_S, taken_s)] += 1
        self.sum_s += taken_s
