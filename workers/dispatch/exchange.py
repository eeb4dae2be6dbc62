"""The dispatcher over links: rows go to expert workers and come back, whatever happens to them.

One thread, that of the model, plans, packs, sends, accepts and sums; it alone touches the state of
calls, and it never waits on a link but on one bell, with a deadline. The threads of the links put
replies and news into an inbox and ring. What is sent again and which replies count is decided in
`recovery`, to whom in `plan`.

Shape legend: T rows of a layer, D hidden, K experts a row.
"""

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.clock import Clock
from workers.dispatch.base import DispatchHandle
from workers.dispatch.header import Flag, Header, Kind, ReplyFrame, Status
from workers.dispatch.link_set import LinkSet, OpenLink, Peer
from workers.dispatch.options import DispatchOptions, MessageShape
from workers.dispatch.plan import PlannedCall, ReplicaIndex
from workers.dispatch.recovery import Attempt, Group, HedgeBudget, LayerCall, Pairs
from workers.dispatch.roster import Roster
from workers.dispatch.rows import (
    StagedReply,
    pack_rows,
    sum_by_expert,
    sum_partials,
    summed_masks,
)
from workers.errors import DeadlineError, DispatchError, LinkClosedError, RefusedError
from workers.placement import MemberId, MemberState, Role, View

log = logging.getLogger(__name__)

__all__ = ["DispatchOptions", "LinkDispatcher", "MessageShape"]

_LINKED = frozenset({MemberState.WARM, MemberState.ACTIVE, MemberState.DRAINING})
_LONGEST_TURN_S = 1.0  # of one wait; parked rows wait as many turns as it takes
_NOT_WAITING = 1 << 62


@dataclass(slots=True, eq=False)
class OpenCall:
    """A dispatched layer until it is combined; the handle of this dispatcher."""

    state: LayerCall
    x_TD: Tensor
    weights_TK: NDArray[np.float32]
    number: int

    @property
    def num_rows(self) -> int:
        """Rows that were dispatched."""
        return self.x_TD.shape[0]


class Arrived(NamedTuple):
    """A reply as its link's thread leaves it in the inbox."""

    peer: Peer
    opened: OpenLink
    header: Header
    frame: ReplyFrame
    at_s: float


class LinkDispatcher:
    """A `Dispatcher` over links to the expert workers of the newest View that it was given."""

    def __init__(
        self,
        member: MemberId,
        rank: int,
        *,
        shape: MessageShape,
        options: DispatchOptions,
        host: str,
        clock: Clock,
    ) -> None:
        self._options = options
        self._clock = clock
        rows_per_call = options.capacity_rows
        if options.bit_stable:
            rows_per_call //= shape.top_k  # as many rows come back as there are pairs
        self._roster = Roster(rows_per_call=rows_per_call, stale_retry_s=options.stale_retry_s)
        self._changed = threading.Condition()  # guards Peer.open, and tells of its changes
        self._adopting = threading.Lock()
        self._inbox: deque[Arrived] = deque()
        self._lost: deque[OpenLink] = deque()
        self._dirty = False  # there is news: links, Views, deadlines
        self._bell = threading.Lock()  # taken while silent; releasing it rings
        self._bell.acquire()
        self._ring_at = _NOT_WAITING  # replies in the inbox that are worth a ring
        self._closed = False
        self._by_message: dict[int, OpenCall] = {}
        self._open: list[OpenCall] = []
        self._num_messages = 0
        self._num_calls = 0
        self._budget = HedgeBudget(options.hedge_share)
        self._counters = dict.fromkeys(
            ("messages", "resends", "hedges", "stale_answers", "late_replies", "suspicions"), 0
        )
        self._wait_s = 0.0
        self._parked_s = 0.0
        self._links = LinkSet(
            member, rank, shape=shape, options=options, host=host, clock=clock, user=self
        )

    @property
    def store_address(self) -> str:
        """Where the workers meet this rank: HOST:PORT of the store that it owns."""
        return self._links.store_address

    def adopt(self, view: View) -> None:
        """Take a View if it is newer than the one held. Any thread.

        Raises RefusedError when it names more workers than this process may have links.
        """
        members = view.with_role(Role.EXPERT_WORKER)
        linked = [m.id for m in members if m.state in _LINKED]
        if len(linked) > self._options.max_links:
            raise RefusedError(f"{len(linked)} expert workers for {self._options.max_links} links")
        index = ReplicaIndex(view)
        with self._adopting:
            if self._closed or not self._roster.adopt(index):
                return
            self._links.want(linked)
            self._tell()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every expert of the View has a worker with an open link.

        Raises DeadlineError when that takes longer than `timeout_s`.
        """
        deadline_s = self._clock.now_s() + timeout_s
        with self._changed:
            while not self._roster.covered(self._links.peers):
                left_s = deadline_s - self._clock.now_s()
                if left_s <= 0:
                    up = sorted(str(p.worker) for p in self._links.peers.values() if p.open)
                    raise DeadlineError(f"not all experts are covered; links are open to {up}")
                self._changed.wait(min(left_s, _LONGEST_TURN_S))

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> OpenCall:
        """See `Dispatcher`; rows of which no replica can be reached are parked."""
        ids_TK = expert_ids_TK.cpu().numpy().astype(np.int32)
        self._num_calls += 1
        call = OpenCall(
            state=LayerCall(layer, Pairs.all_of(ids_TK)),
            x_TD=x_TD,
            weights_TK=weights_TK.cpu().numpy(),
            number=self._num_calls,
        )
        while self._inbox:  # what came late clears suspicions and frees buffers
            self._take_in(self._inbox.popleft())
        self._open.append(call)
        self._advance(call)
        return call

    def combine(self, handle: DispatchHandle) -> Tensor:
        """See `Dispatcher`; waits for as long as rows are parked.

        Raises LinkClosedError when the dispatcher is closed meanwhile.
        """
        assert isinstance(handle, OpenCall)
        started_s = self._clock.now_s()
        while not self._completed(handle):
            if self._dirty:
                self._tend()
            else:
                self._listen(handle)
        self._ring_at = _NOT_WAITING
        self._wait_s += self._clock.now_s() - started_s
        winners = list(handle.state.cover())
        y_TD = (sum_by_expert if self._options.bit_stable else sum_partials)(winners, handle.x_TD)
        self._forget(handle)
        return y_TD

    def close(self) -> None:
        """Close all links; whoever waits in `combine` gets LinkClosedError."""
        self._closed = True
        self._tell()
        with self._adopting:
            self._links.close()

    def stats(self) -> dict[str, Any]:
        """Return the counters; all but `links` only rise while a worker stays."""
        peers = self._links.peers.values()
        return {
            **self._counters,
            "rows_by_worker": {str(p.worker): p.rows for p in peers},
            "links": sum(p.open is not None for p in peers),
            "links_opened": sum(p.links_opened for p in peers),
            "wait_s": self._wait_s,
            "parked_s": self._parked_s,
        }

    # The model's thread.

    def _completed(self, call: OpenCall) -> bool:
        """Take in what has arrived; whether the call is complete."""
        while self._inbox:
            self._take_in(self._inbox.popleft())
        return call.state.complete

    def _listen(self, call: OpenCall) -> None:
        """Wait until enough replies are in, something happened, or a deadline passed."""
        state = call.state
        parked = any(open_call.state.needs() for open_call in self._open)
        queued = any(p.open is not None and p.open.queue for p in self._links.peers.values())
        self._ring_at = 1 if state.disturbed or queued else len(state.outstanding)
        # Looked at after the threshold is set: whoever came before did not ring.
        if self._dirty or len(self._inbox) >= self._ring_at > 0:
            return
        now_s = self._clock.now_s()
        if not self._bell.acquire(timeout=self._turn_s(now_s, parked=parked)):
            self._dirty = True
        if parked:
            self._parked_s += self._clock.now_s() - now_s

    def _turn_s(self, now_s: float, *, parked: bool) -> float:
        """How long to wait at most: until a deadline, or a retry of what is parked."""
        longest_s = self._options.stale_retry_s if parked else _LONGEST_TURN_S
        for call in self._open:
            longest_s = min(longest_s, call.state.next_deadline_s() - now_s)
        return max(longest_s, 0.0)

    def _forget(self, call: OpenCall) -> None:
        """Release what a combined call holds; replies that still come are late."""
        self._open.remove(call)
        for attempt in call.state.accepted:
            attempt.payload.release()
        for message_id in call.state.outstanding:
            self._by_message.pop(message_id, None)
        self._pump_all()

    def _tend(self) -> None:
        """Look after all open calls: lost links, deadlines, what waits to be sent."""
        self._dirty = False
        if self._closed:
            raise LinkClosedError("the dispatcher was closed while rows were on their way")
        while self._lost:
            self._give_up(self._lost.popleft())
        now_s = self._clock.now_s()
        for call in self._open:
            for attempt in call.state.overdue(now_s):
                self._overdue(call, attempt, now_s)
        for call in self._open:
            self._advance(call)
        self._pump_all()

    def _advance(self, call: OpenCall) -> None:
        """Send what has a worker; the rest stays parked."""
        for group in call.state.needs():
            for opened, attempt in self._place_group(call, group):
                if opened.free_buffers and not opened.queue:
                    self._send(call, opened, attempt)
                else:
                    opened.queue.append(attempt)
                    self._pump(opened)

    def _place_group(self, call: OpenCall, group: Group) -> list[tuple[OpenLink, Attempt]]:
        """Plan the waiting pairs of a group; returns its attempts, to be sent."""
        waiting = group.waiting
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
            return self._place_group(call, group)
        placed = []
        for planned, peer, opened in zip(plan.calls, peers, links, strict=True):
            assert opened is not None
            pairs = _pairs(planned).within(waiting)
            attempt = self._attempt(peer, opened, pairs, group.number, now_s)
            self._by_message[attempt.message_id] = call
            opened.started(attempt.message_id, planned.num_experts)
            placed.append((opened, attempt))
        rest = None if plan.unserved is None else _pairs(plan.unserved).within(waiting)
        call.state.place(group, [attempt for _, attempt in placed], rest)
        if group.number > 1:
            self._counters["resends"] += len(placed)
        return placed

    def _attempt(
        self, peer: Peer, opened: OpenLink, pairs: Pairs, number: int, now_s: float
    ) -> Attempt:
        self._num_messages += 1
        self._counters["messages"] += 1
        self._budget.num_calls += 1
        num_rows = len(pairs.masks_R)
        peer.rows += num_rows
        allowed_s = peer.times.deadline_s(num_rows) * (1 + len(opened.queue))
        return Attempt(
            message_id=self._num_messages,
            worker=peer.worker,
            incarnation=opened.incarnation,
            pairs=pairs,
            number=number,
            sent_s=now_s,
            deadline_s=now_s + allowed_s,
        )

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
            flags=Flag.ROW_PER_EXPERT if self._options.bit_stable else 0,
        )
        attempt.sent_s = opened.idle_since_s = self._clock.now_s()
        try:
            opened.link.send(frame, header)
        except LinkClosedError:
            self._drop(opened)

    def _pump_all(self) -> None:
        for peer in self._links.peers.values():
            opened = peer.open
            if opened is not None and opened.queue:
                self._pump(opened)

    def _pump(self, opened: OpenLink) -> None:
        """Send what awaits a buffer, making room where staged replies hold the buffers."""
        if not opened.free_buffers:
            for call in self._open:
                for attempt in call.state.accepted:
                    attempt.payload.detach(opened)
        while opened.queue and opened.free_buffers:
            attempt = opened.queue.popleft()
            owner = self._by_message.get(attempt.message_id)
            if owner is not None and attempt.needed and not attempt.lost:
                self._send(owner, opened, attempt)
            else:
                opened.ended(attempt.message_id)

    def _take_in(self, arrived: Arrived) -> None:
        """Accept a reply, or drop it when it is late."""
        peer, opened, header, frame, at_s = arrived
        opened.ended(header.message_id)
        draining = header.status == Status.DRAINING
        if peer.suspect or peer.draining != draining:
            peer.suspect, peer.draining = False, draining
            self._roster.changed()
        call = self._by_message.pop(header.message_id, None)
        attempt = call.state.outstanding.get(header.message_id) if call is not None else None
        if call is None or attempt is None:
            self._counters["late_replies"] += 1
            opened.release(header.buffer, frame)
            return
        staged = StagedReply(opened, header.buffer, frame, header.num_rows)
        try:
            summed_R = summed_masks(staged, attempt.pairs, row_per_expert=self._options.bit_stable)
        except DispatchError:
            log.exception("a reply of %s makes no sense", peer.worker)
            self._drop(opened)
            return
        if not call.state.reply(
            header.message_id, peer.worker, header.incarnation, summed_R, staged
        ):
            self._counters["late_replies"] += 1
            staged.release()
            return
        peer.times.record(len(attempt.pairs.masks_R), at_s - attempt.sent_s)
        if header.kind == Kind.STALE:
            left = attempt.groups[-1].waiting
            assert left is not None
            experts = np.unique(left.ids_RK[left.ids_RK >= 0]).tolist()
            self._counters["stale_answers"] += 1
            self._roster.stale(peer.worker, call.state.layer, experts, at_s)
            self._dirty = True
        elif opened.queue:
            self._pump(opened)

    def _overdue(self, call: OpenCall, attempt: Attempt, now_s: float) -> None:
        """A deadline passed: the worker is suspect; hedge if that can help."""
        peer = self._links.peers.get(attempt.worker)
        if peer is None:
            return
        attempt.deadline_s = now_s + peer.times.deadline_s(len(attempt.pairs.masks_R))
        if not peer.suspect:
            peer.suspect = True
            self._counters["suspicions"] += 1
            self._roster.changed()
        if all(group.dropped for group in attempt.groups) and self._may_hedge(call, attempt, now_s):
            self._counters["hedges"] += 1
            call.state.hedge(attempt)

    def _may_hedge(self, call: OpenCall, attempt: Attempt, now_s: float) -> bool:
        """Whether others hold all of an attempt's experts, are no busier, and the budget allows."""
        planner = self._roster.planner(self._links.peers, now_s)
        if planner is None or not planner.serves(call.state.layer, attempt.pairs.ids_RK):
            return False
        own = self._links.peers[attempt.worker].open
        plan = planner.plan(call.state.layer, attempt.pairs.ids_RK)
        others = [self._roster.peer(planned.worker).open for planned in plan.calls]
        if own is None or any(o is None or o.num_calls > own.num_calls for o in others):
            return False
        return self._budget.take()

    def _give_up(self, opened: OpenLink) -> None:
        """Give up what is under way on a link that is lost; it is waiting to be sent again."""
        for call in self._open:
            for attempt in call.state.link_lost(opened.worker, opened.incarnation):
                self._by_message.pop(attempt.message_id, None)
        opened.queue.clear()

    # Any thread: those of the links, of whoever brings a View, and the model's.

    def link_up(self, peer: Peer, opened: OpenLink) -> None:
        """See `LinkUser`."""
        with self._changed:
            peer.open = opened
            peer.suspect = peer.draining = False
        self._tell()

    def link_down(self, peer: Peer, opened: OpenLink) -> None:
        """See `LinkUser`."""
        with self._changed:
            if peer.open is opened:
                peer.open = None
        self._lost.append(opened)
        self._tell()

    def received(self, peer: Peer, opened: OpenLink, header: Header, frame: ReplyFrame) -> None:
        """See `LinkUser`."""
        if header.kind not in {Kind.REPLY, Kind.STALE}:
            raise DispatchError(f"a message of kind {header.kind} where a reply was due")
        self._inbox.append(Arrived(peer, opened, header, frame, self._clock.now_s()))
        if len(self._inbox) >= self._ring_at:
            self._ring()

    def _drop(self, opened: OpenLink) -> None:
        """Have a link closed and opened anew, by its own thread."""
        opened.link.close()
        peer = self._links.peers.get(opened.worker)
        if peer is not None:
            self.link_down(peer, opened)

    def _tell(self) -> None:
        """Have the model's thread look at what changed, and plan anew."""
        self._roster.changed()
        self._dirty = True
        self._ring()
        with self._changed:
            self._changed.notify_all()

    def _ring(self) -> None:
        if self._bell.locked():
            try:
                self._bell.release()
            except RuntimeError:  # somebody else rang in between
                return


def _pairs(planned: PlannedCall) -> Pairs:
    return Pairs(planned.rows_R, planned.ids_RK, planned.masks_R)
