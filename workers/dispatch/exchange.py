"""The dispatcher over links: rows go to expert workers and come back, whatever happens to them.

One thread, that of the model, plans, packs, sends and sums; it never waits on a link, but on one
condition with a deadline. The thread of each link hands replies over under the same lock. What is
sent again and which replies count is decided in `recovery`, to whom in `plan`.

Shape legend: T rows of a layer, D hidden, K experts a row.
"""

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.clock import Clock
from workers.dispatch.base import DispatchHandle
from workers.dispatch.header import Flag, Header, Kind, ReplyFrame, Status
from workers.dispatch.link_set import LinkSet, OpenLink, Peer
from workers.dispatch.options import DispatchOptions, MessageShape
from workers.dispatch.plan import PlannedCall, Planner, ReplicaIndex
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

__all__ = ["DispatchOptions", "LinkDispatcher", "MessageShape"]

_LINKED = frozenset({MemberState.WARM, MemberState.ACTIVE, MemberState.DRAINING})
_LONGEST_TURN_S = 1.0  # of one wait; parked rows wait as many turns as it takes


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
        self._changed = threading.Condition()
        self._adopting = threading.Lock()
        rows_per_call = options.capacity_rows
        if options.bit_stable:
            rows_per_call //= shape.top_k  # as many rows come back as there are pairs
        self._roster = Roster(rows_per_call=rows_per_call, stale_retry_s=options.stale_retry_s)
        self._by_message: dict[int, OpenCall] = {}
        self._open: list[OpenCall] = []
        self._dirty = False  # something happened that the model's thread must look after
        self._closed = False
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
            with self._changed:
                if self._closed or not self._roster.adopt(view, index):
                    return
                self._touch()
            self._links.want(linked)
            with self._changed:
                self._touch()

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
        ids_TK = expert_ids_TK.cpu().numpy()
        all_T = np.full(len(ids_TK), (1 << ids_TK.shape[1]) - 1, dtype=np.uint32)
        self._num_calls += 1
        call = OpenCall(
            state=LayerCall(layer, Pairs(None, ids_TK, all_T)),
            x_TD=x_TD,
            weights_TK=weights_TK.cpu().numpy(),
            number=self._num_calls,
        )
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
            self._tend()
        self._wait_s += self._clock.now_s() - started_s
        winners = list(handle.state.cover())
        y_TD = (sum_by_expert if self._options.bit_stable else sum_partials)(winners, handle.x_TD)
        self._open.remove(handle)
        for attempt in handle.state.accepted:
            attempt.payload.release()
        for message_id in handle.state.outstanding:
            self._by_message.pop(message_id, None)
        self._pump_all()
        return y_TD

    def close(self) -> None:
        """Close all links; whoever waits in `combine` gets LinkClosedError."""
        with self._changed:
            self._closed = True
            self._touch()
        with self._adopting:
            self._links.close()

    def stats(self) -> dict[str, object]:
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
        """Wait until the call is complete (True) or something else needs looking after."""
        with self._changed:
            if not call.state.complete and not self._dirty:
                started_s = self._clock.now_s()
                self._changed.wait(self._turn_s(started_s))
                if any(open_call.state.needs() for open_call in self._open):
                    self._parked_s += self._clock.now_s() - started_s
            self._dirty = False
            return call.state.complete

    def _turn_s(self, now_s: float) -> float:
        """How long to wait at most: until a deadline, or a retry of something parked."""
        longest_s = _LONGEST_TURN_S
        for call in self._open:
            longest_s = min(longest_s, call.state.next_deadline_s() - now_s)
            if call.state.needs():
                longest_s = min(longest_s, self._options.stale_retry_s)
        return max(longest_s, 0.0)

    def _tend(self) -> None:
        """Look after all open calls: hedge what is overdue, send what waits."""
        if self._closed:
            raise LinkClosedError("the dispatcher was closed while rows were on their way")
        now_s = self._clock.now_s()
        with self._changed:
            for call in self._open:
                for attempt in call.state.overdue(now_s):
                    self._overdue(call, attempt, now_s)
        for call in self._open:
            self._advance(call)
        self._pump_all()

    def _advance(self, call: OpenCall) -> None:
        """Send what has a worker; the rest stays parked."""
        while True:
            with self._changed:
                placed = self._place(call)
            if not placed:
                return
            for opened, attempt in placed:
                if opened.free_buffers and not opened.queue:
                    self._send(call, opened, attempt)
                else:
                    opened.queue.append(attempt)
                    self._pump(opened)

    def _place(self, call: OpenCall) -> list[tuple[OpenLink, Attempt]]:
        """Plan the waiting pairs of a call; the lock is held."""
        groups = call.state.needs()
        now_s = self._clock.now_s()
        planner = self._roster.planner(self._links.peers, now_s) if groups else None
        if planner is None:
            return []
        placed: list[tuple[OpenLink, Attempt]] = []
        for group in groups:
            placed += self._place_group(call, group, planner, now_s)
        return placed

    def _place_group(
        self, call: OpenCall, group: Group, planner: Planner, now_s: float
    ) -> list[tuple[OpenLink, Attempt]]:
        waiting = group.waiting
        assert waiting is not None
        peers = self._roster.peers
        load_W = [p.open.num_experts if p and p.open else 0 for p in peers]
        plan = planner.plan(call.state.layer, waiting.ids_RK, load_W)
        placed = []
        for planned in plan.calls:
            peer = peers[planned.worker]
            assert peer is not None
            assert peer.open is not None
            pairs = _pairs(planned).within(waiting)
            attempt = self._attempt(peer, peer.open, pairs, group.number, now_s)
            self._by_message[attempt.message_id] = call
            peer.open.started(attempt.message_id, planned.num_experts)
            placed.append((peer.open, attempt))
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
            with self._changed:
                self._lose(opened)

    def _pump_all(self) -> None:
        for peer in self._links.peers.values():
            opened = peer.open
            if opened is not None and opened.queue:
                self._pump(opened)

    def _pump(self, opened: OpenLink) -> None:
        """Send what awaits a buffer, making room where staged replies hold the buffers."""
        if not opened.free_buffers:
            with self._changed:
                for call in self._open:
                    for attempt in call.state.accepted:
                        attempt.payload.detach(opened)
        while opened.queue and opened.free_buffers:
            attempt = opened.queue.popleft()
            call = self._by_message.get(attempt.message_id)
            if call is not None and attempt.needed and not attempt.lost:
                self._send(call, opened, attempt)
            else:
                opened.ended(attempt.message_id)

    def _overdue(self, call: OpenCall, attempt: Attempt, now_s: float) -> None:
        """A deadline passed: the worker is suspect; hedge if that can help; the lock is held."""
        peer = self._links.peers.get(attempt.worker)
        if peer is None:
            return
        attempt.deadline_s = now_s + peer.times.deadline_s(len(attempt.pairs.masks_R))
        if not peer.suspect:
            peer.suspect = True
            self._counters["suspicions"] += 1
            self._roster.changed()
        planner = self._roster.planner(self._links.peers, now_s)
        if planner is None or any(not group.dropped for group in attempt.groups):
            return
        if not planner.serves(call.state.layer, attempt.pairs.ids_RK):
            return
        if self._budget.take():
            self._counters["hedges"] += 1
            call.state.hedge(attempt)

    # The threads of the links.

    def link_up(self, peer: Peer, opened: OpenLink) -> None:
        """See `LinkUser`."""
        with self._changed:
            peer.open = opened
            peer.suspect = peer.draining = False
            self._touch()

    def link_down(self, peer: Peer, opened: OpenLink) -> None:
        """See `LinkUser`."""
        with self._changed:
            if peer.open is opened:
                peer.open = None
            self._lose(opened)

    def received(self, peer: Peer, opened: OpenLink, header: Header, frame: ReplyFrame) -> None:
        """See `LinkUser`."""
        if header.kind not in {Kind.REPLY, Kind.STALE}:
            raise DispatchError(f"a message of kind {header.kind} where a reply was due")
        with self._changed:
            now_s = self._clock.now_s()
            opened.ended(header.message_id)
            draining = header.status == Status.DRAINING
            if peer.suspect or peer.draining != draining:
                peer.suspect, peer.draining = False, draining
                self._roster.changed()
            call = self._by_message.pop(header.message_id, None)
            if call is None or not self._accept(call, peer, opened, header, frame, now_s):
                self._counters["late_replies"] += 1
                opened.release(header.buffer, frame)
            if opened.queue or (call is not None and call.state.needs()):
                self._wake()
            elif call is not None and call.state.complete:
                self._changed.notify_all()

    def _accept(
        self,
        call: OpenCall,
        peer: Peer,
        opened: OpenLink,
        header: Header,
        frame: ReplyFrame,
        now_s: float,
    ) -> bool:
        attempt = call.state.outstanding.get(header.message_id)
        if attempt is None:
            return False
        summed_R = summed_masks(
            frame, header.num_rows, attempt.pairs, row_per_expert=self._options.bit_stable
        )
        staged = StagedReply(opened, header.buffer, frame, header.num_rows)
        accepted = call.state.reply(
            header.message_id, peer.worker, header.incarnation, summed_R, staged
        )
        if accepted is None:
            return False
        peer.times.record(len(attempt.pairs.masks_R), now_s - attempt.sent_s)
        if header.kind == Kind.STALE:
            left = attempt.groups[-1].waiting
            assert left is not None
            experts = np.unique(left.ids_RK[left.ids_RK >= 0]).tolist()
            self._counters["stale_answers"] += 1
            self._roster.stale(peer.worker, call.state.layer, experts, now_s)
        return True

    def _lose(self, opened: OpenLink) -> None:
        """Give up what is under way on a broken link; the lock is held."""
        for call in self._open:
            for attempt in call.state.link_lost(opened.worker, opened.incarnation):
                self._by_message.pop(attempt.message_id, None)
        opened.queue.clear()
        peer = self._links.peers.get(opened.worker)
        if peer is not None and peer.open is opened:
            peer.open = None
        self._touch()

    def _touch(self) -> None:
        """Plan anew and make the model's thread look; the lock is held."""
        self._roster.changed()
        self._wake()

    def _wake(self) -> None:
        self._dirty = True
        self._changed.notify_all()


def _pairs(planned: PlannedCall) -> Pairs:
    return Pairs(planned.rows_R, planned.ids_RK, planned.masks_R)
