"""What leaves a gateway rank: waiting pairs are planned, packed and sent, and remembered.

Belongs to the model's thread. Shape legend: T rows of a layer, D hidden, K experts a row.
"""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.clock import Clock
from workers.dispatch.header import Flag, Header, Kind
from workers.dispatch.link_set import LinkSet, OpenLink, Peer
from workers.dispatch.options import DispatchOptions
from workers.dispatch.plan import PlannedCall
from workers.dispatch.recovery import Attempt, Group, LayerCall
from workers.dispatch.roster import Roster
from workers.dispatch.row_pairs import Pairs
from workers.dispatch.rows import pack_rows
from workers.errors import LinkClosedError


@dataclass(slots=True, eq=False)
class OpenCall:
    """A dispatched layer until it is combined or dropped."""

    state: LayerCall
    x_TD: Tensor
    weights_TK: NDArray[np.float32]
    number: int
    lost_s: float | None = None  # when the first loss of its rows was noticed


class CallHandle:
    """The handle of an open call. A step that fails drops it, and with it the call."""

    def __init__(self, call: OpenCall, outbox: "Outbox") -> None:
        self.call = call
        self._outbox = outbox

    @property
    def num_rows(self) -> int:
        """Rows that were dispatched."""
        return self.call.x_TD.shape[0]

    @property
    def given_up(self) -> Collection[int]:
        """See `DispatchHandle`."""
        return self.call.state.suspects.given_up

    def __del__(self) -> None:
        self._outbox.dropped.append(self.call)


class Outbox:
    """Sends the waiting pairs of open calls to whoever the roster says."""

    def __init__(
        self, roster: Roster, links: LinkSet, options: DispatchOptions, clock: Clock
    ) -> None:
        self._roster = roster
        self._links = links
        self._options = options
        self._clock = clock
        self._by_message: dict[int, OpenCall] = {}
        self.calls: list[OpenCall] = []
        self.dropped: deque[OpenCall] = deque()  # their handles are gone; combined or not
        self.num_messages = 0
        self.num_resends = 0

    def open(self, call: OpenCall) -> CallHandle:
        """Begin a call, after forgetting those whose handles were dropped meanwhile."""
        while self.dropped:
            self.forget(self.dropped.popleft())
        self.calls.append(call)
        self.advance(call)
        return CallHandle(call, self)

    def advance(self, call: OpenCall) -> None:
        """Send what has a worker; the rest stays parked."""
        for group in call.state.needs():
            for opened, attempt in self._place(call, group):
                if opened.free_buffers and not opened.queue:
                    self._send(call, opened, attempt)
                else:
                    opened.queue.append(attempt)
                    self._send_queued(opened)

    def advance_all(self) -> None:
        """Send what can be sent of all open calls."""
        for call in self.calls:
            self.advance(call)
        for opened in self._queued():
            self._send_queued(opened)

    def is_queued(self) -> bool:
        """Whether messages await a buffer of their link."""
        return next(self._queued(), None) is not None

    def claim(self, message_id: int) -> OpenCall | None:
        """Return the call of a message that was answered, once."""
        return self._by_message.pop(message_id, None)

    def give_up(self, opened: OpenLink, noticed_s: float) -> None:
        """Give up what is under way on a link that is lost; its pairs wait to be sent again.

        Not those of a call that ends by it, with a row that workers end by.
        """
        for call in self.calls:
            lost = call.state.link_lost(opened.worker, opened.incarnation, opened.ended_by)
            for attempt in lost:
                self.claim(attempt.message_id)
                call.lost_s = noticed_s if call.lost_s is None else call.lost_s
        opened.queue.clear()

    def forget(self, call: OpenCall) -> None:
        """Release what a call holds; replies that still come for it are late. Repeatable."""
        if call not in self.calls:
            return
        self.calls.remove(call)
        for attempt in call.state.accepted:
            attempt.payload.release()
        for message_id in call.state.outstanding:
            self.claim(message_id)
        for opened in self._queued():
            self._send_queued(opened)

    def _queued(self) -> Iterator[OpenLink]:
        for peer in self._links.peers.values():
            opened = peer.open
            if opened is not None and opened.queue:
                yield opened

    def _place(self, call: OpenCall, group: Group) -> list[tuple[OpenLink, Attempt]]:
        """Plan the waiting pairs of a group; returns its attempts, to be sent."""
        suspects, waiting = call.state.suspects, group.waiting
        assert waiting is not None
        now_s = self._clock.now_s()
        planner = self._roster.planner(self._links.peers, now_s)
        if planner is None:
            return []
        plan = planner.plan(call.state.layer, waiting.ids_RK, self._roster.load)
        peers = [self._roster.peer(planned.worker) for planned in plan.calls]
        links = [peer.open for peer in peers]
        if None in links:  # one broke a moment ago: plan again with what is known now
            self._roster.changed()
            return self._place(call, group)
        placed = []
        for planned, peer, opened in zip(plan.calls, peers, links, strict=True):
            assert opened is not None
            pairs = _pairs(planned).within(waiting)
            for part, is_alone in suspects.apart(pairs) if suspects else ((pairs, False),):
                attempt = self._attempt(
                    peer, opened, part, number=group.number, now_s=now_s, is_alone=is_alone
                )
                self._by_message[attempt.message_id] = call
                num_experts = part.num_experts if is_alone else planned.num_experts
                opened.started(attempt.message_id, num_experts)
                placed.append((opened, attempt))
        rest = None if plan.unserved is None else _pairs(plan.unserved).within(waiting)
        call.state.place(group, [attempt for _, attempt in placed], rest)
        if group.number > 1:
            self.num_resends += len(placed)
        return placed

    def _attempt(
        self,
        peer: Peer,
        opened: OpenLink,
        pairs: Pairs,
        *,
        number: int,
        now_s: float,
        is_alone: bool,
    ) -> Attempt:
        self.num_messages += 1
        num_rows = len(pairs.masks_R)
        peer.rows += num_rows
        # Those that are alone wait for one another, and nobody has learned for how long.
        first_s = self._options.first_deadline_s
        allowed_s = first_s if is_alone else peer.times.deadline_s(num_rows)
        return Attempt(
            message_id=self.num_messages,
            worker=peer.worker,
            incarnation=opened.incarnation,
            pairs=pairs,
            number=number,
            sent_s=now_s,
            allowed_s=allowed_s,
            deadline_s=now_s + allowed_s * (1 + len(opened.queue)),
            is_alone=is_alone,
        )

    def _send_queued(self, opened: OpenLink) -> None:
        """Send what awaits a buffer, making room where staged replies hold the buffers."""
        if not opened.free_buffers:
            for call in self.calls:
                for attempt in call.state.accepted:
                    attempt.payload.detach(opened)
        while opened.queue and opened.free_buffers:
            attempt = opened.queue.popleft()
            owner = self._by_message.get(attempt.message_id)
            if owner is not None and owner.state.awaits(attempt):
                self._send(owner, opened, attempt)
            else:
                opened.ended(attempt.message_id)

    def _send(self, call: OpenCall, opened: OpenLink, attempt: Attempt) -> None:
        """Pack an attempt into a free buffer and send it."""
        buffer = opened.free_buffers.pop()
        frame = opened.frame(buffer)
        pack_rows(frame, attempt.pairs, call.x_TD, call.weights_TK)
        term, version = self._roster.order
        header = Header(
            Kind.DATA,
            attempt.message_id,
            attempt.incarnation,
            layer=call.state.layer,
            micro_batch=call.number & 0xFF,
            attempt=min(attempt.number, 255),
            term=term,
            view_version=version,
            num_rows=len(attempt.pairs.masks_R),
            capacity=frame.capacity,
            buffer=buffer,
            flags=Flag.ROW_PER_EXPERT * self._options.bit_stable | Flag.ALONE * attempt.is_alone,
        )
        attempt.sent_s = opened.idle_since_s = now_s = self._clock.now_s()
        attempt.deadline_s = max(attempt.deadline_s, now_s + attempt.allowed_s)
        try:
            opened.link.send(frame, header)
            attempt.is_sent = True
        except LinkClosedError:
            self._links.abandon(opened)


def _pairs(planned: PlannedCall) -> Pairs:
    return Pairs(planned.rows_R, planned.ids_RK, planned.masks_R)
