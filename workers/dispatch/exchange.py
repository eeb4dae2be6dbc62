"""The dispatcher over links: rows go to expert workers and come back, whatever happens to them.

One thread, that of the model, plans, packs, sends, accepts and sums; it alone touches the state of
calls, and it never waits on a link but on one bell, with a deadline. The threads of the links put
replies and news into an inbox and ring. What is sent again and which replies count is decided in
`recovery`, to whom in `plan`.

Shape legend: T rows of a layer, D hidden, K experts a row.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from workers.clock import Clock
from workers.dispatch.base import DispatchHandle
from workers.dispatch.header import Header, Kind, ReplyFrame, Status
from workers.dispatch.inbox import Arrived, Inbox
from workers.dispatch.link_set import LinkSet, OpenLink, Peer
from workers.dispatch.options import DispatchOptions, MessageShape
from workers.dispatch.outbox import CallHandle, OpenCall, Outbox
from workers.dispatch.plan import ReplicaIndex
from workers.dispatch.recovery import Attempt, HedgeBudget, LayerCall, Recoveries
from workers.dispatch.roster import Roster
from workers.dispatch.row_pairs import Pairs
from workers.dispatch.rows import StagedReply, sum_by_expert, sum_partials, summed_masks
from workers.dispatch.tally import LoadReport, LoadTally
from workers.errors import DeadlineError, DispatchError, LinkClosedError
from workers.placement import NO_CELL, MemberId, MemberState, Role, View

__all__ = ["DispatchOptions", "LinkDispatcher", "MessageShape"]

_LINKED = frozenset({MemberState.WARM, MemberState.ACTIVE, MemberState.DRAINING})
_LONGEST_TURN_S = 1.0  # of one wait; parked rows wait as many turns as it takes

log = logging.getLogger(__name__)


class LinkDispatcher:
    """A `Dispatcher` over links to the expert workers of the newest View that it was given.

    `inbox` and `open_links` are what waits and what has threads: a simulation brings its own.
    """

    def __init__(
        self,
        member: MemberId,
        rank: int,
        *,
        shape: MessageShape,
        options: DispatchOptions,
        host: str,
        clock: Clock,
        inbox: Inbox | None = None,
        open_links: Callable[..., LinkSet] = LinkSet,
    ) -> None:
        self._member = member
        self._options = options
        self._clock = clock
        rows_per_call = options.capacity_rows
        if options.bit_stable:
            rows_per_call //= shape.top_k  # as many rows come back as there are pairs
        self._roster = Roster(rows_per_call=rows_per_call, stale_retry_s=options.stale_retry_s)
        self._changed = threading.Condition()  # guards Peer.open, and tells of its changes
        self._adopting = threading.Lock()
        self._inbox = inbox or Inbox()
        self._closed = False
        self._num_calls = 0
        self._budget = HedgeBudget(options.hedge_share)
        self._counters = dict.fromkeys(("hedges", "stale_answers", "late_replies", "suspicions"), 0)
        self._longest_deadline_s = 0.0  # of those that were missed
        self._wait_s = 0.0
        self._parked_s = 0.0
        self._recoveries = Recoveries()
        self._tally = LoadTally()
        self._links = open_links(
            member, rank, shape=shape, options=options, host=host, clock=clock, user=self
        )
        self._outbox = Outbox(self._roster, self._links, options, clock)

    @property
    def store_address(self) -> str:
        """Where the workers meet this rank: HOST:PORT of the store that it owns."""
        return self._links.store_address

    def adopt(self, view: View) -> None:
        """Take a View if it is newer than the one held. Any thread.

        Where it has more workers than this process may have links, its own cell's serving ones come
        first, then those to come, standbys, and what is borrowed; of each, those that have a link.
        """
        cell, most = view.cell_of(self._member), self._options.max_links
        mine = view.within(cell)
        members = [m for m in mine.with_role(Role.EXPERT_WORKER) if m.state in _LINKED]
        members.sort(
            key=lambda m: (
                m.cell not in {cell, NO_CELL},
                m.cell == NO_CELL,
                not m.serves,
                m.id not in self._links.peers,
            )
        )
        linked = [m.id for m in members[:most]]
        if len(linked) < len(members):
            log.warning("%d expert workers for %d links", len(members), most)
        index = ReplicaIndex(mine)
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
    ) -> CallHandle:
        """See `Dispatcher`; rows of which no replica can be reached are parked."""
        ids_TK = expert_ids_TK.cpu().numpy().astype(np.int32)
        self._tally.count(layer, ids_TK, self._roster.num_experts)
        self._num_calls += 1
        call = OpenCall(
            state=LayerCall(layer, Pairs.all_of(ids_TK)),
            x_TD=x_TD,
            weights_TK=weights_TK.cpu().numpy(),
            number=self._num_calls,
        )
        self._take_all()  # what came late clears suspicions and frees buffers
        return self._outbox.open(call)

    def combine(self, handle: DispatchHandle) -> Tensor:
        """See `Dispatcher`; waits for as long as rows are parked.

        Raises LinkClosedError when the dispatcher is closed meanwhile.
        """
        assert isinstance(handle, CallHandle)
        call = handle.call
        started_s = self._clock.now_s()
        while not self._completed(call):
            if self._inbox.has_news:
                self._tend()
            else:
                self._listen(call.state)
        ended_s = self._clock.now_s()
        self._wait_s += ended_s - started_s
        if call.lost_s is not None and not handle.given_up:
            self._recoveries.record(ended_s - call.lost_s)
        winners = list(call.state.cover())
        y_TD = (sum_by_expert if self._options.bit_stable else sum_partials)(winners, call.x_TD)
        self._outbox.forget(call)
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
            "messages": self._outbox.num_messages,
            "resends": self._outbox.num_resends,
            "rows_by_worker": {str(p.worker): p.rows for p in peers},
            "links": sum(p.open is not None for p in peers),
            "links_opened": sum(p.links_opened for p in peers),
            "wait_s": self._wait_s,
            "parked_s": self._parked_s,
            "longest_deadline_s": self._longest_deadline_s,
            "recovery_s": self._recoveries.sum_s,
            "recoveries": tuple(self._recoveries.counts),
        }

    def take_load(self) -> LoadReport | None:
        """Return how often experts were asked for since the last time; None when nothing was."""
        return self._tally.take()

    # The model's thread.

    def _listen(self, state: LayerCall) -> None:
        """Wait until enough replies are in, something happened, or a deadline passed."""
        calls = self._outbox.calls
        parked = any(call.state.needs() for call in calls)
        one_by_one = parked or state.disturbed or self._outbox.is_queued()
        now_s = self._clock.now_s()
        turn_s = self._options.stale_retry_s if parked else _LONGEST_TURN_S
        turn_s = min([turn_s, *(call.state.next_deadline_s() - now_s for call in calls)])
        self._inbox.listen(1 if one_by_one else len(state.outstanding), max(turn_s, 0.0))
        if parked:
            self._parked_s += self._clock.now_s() - now_s

    def _tend(self) -> None:
        """Look after all open calls: lost links, deadlines, what waits to be sent."""
        self._inbox.has_news = False
        if self._closed:
            raise LinkClosedError("the dispatcher was closed while rows were on their way")
        while self._inbox.lost:
            self._outbox.give_up(*self._inbox.lost.popleft())
        now_s = self._clock.now_s()
        for call in self._outbox.calls:
            for attempt in call.state.overdue(now_s):
                self._overdue(call, attempt, now_s)
        self._outbox.advance_all()

    def _completed(self, call: OpenCall) -> bool:
        self._take_all()
        return call.state.complete

    def _take_all(self) -> None:
        """Take in all replies that are here."""
        while self._inbox.replies:
            arrived = self._inbox.replies.popleft()
            self._take_in(arrived)
            if arrived.opened.queue:
                self._inbox.has_news = True  # a buffer may have come free for what waits

    def _take_in(self, arrived: Arrived) -> None:
        """Accept a reply, or drop it when it is late."""
        peer, opened, header, frame, at_s = arrived
        opened.ended(header.message_id)
        draining = header.status == Status.DRAINING
        if peer.suspect or peer.draining != draining:
            peer.suspect, peer.draining = False, draining
            self._roster.changed()
        staged = StagedReply(opened, header.buffer, frame, header.num_rows)
        call = self._outbox.claim(header.message_id) if self._is_current(peer, opened) else None
        attempt = call.state.outstanding.get(header.message_id) if call is not None else None
        if call is None or attempt is None:
            self._counters["late_replies"] += 1
            staged.release()
            return
        try:
            summed_R = summed_masks(staged, attempt.pairs, row_per_expert=self._options.bit_stable)
        except DispatchError:
            log.exception("a reply of %s makes no sense", peer.worker)
            opened.close()
            self._links.abandon(opened)
            return
        if not call.state.reply(
            header.message_id, peer.worker, header.incarnation, summed_R, staged
        ):
            self._counters["late_replies"] += 1
            staged.release()
            return
        if not attempt.is_alone:  # those wait for one another, and teach nothing
            peer.times.record(len(attempt.pairs.masks_R), at_s - attempt.sent_s)
        if header.kind == Kind.STALE:
            left = attempt.pairs.only(attempt.pairs.masks_R & ~summed_R)
            experts = np.unique(left.ids_RK[left.ids_RK >= 0]).tolist()
            self._counters["stale_answers"] += 1
            self._roster.stale(peer.worker, call.state.layer, experts, at_s)
            self._inbox.has_news = True  # there is something to send again
        if attempt.payload is not staged:
            staged.release()

    def _is_current(self, peer: Peer, opened: OpenLink) -> bool:
        """Whether a link is the worker's open one; of any other no reply is used."""
        return peer.open is opened

    def _overdue(self, call: OpenCall, attempt: Attempt, now_s: float) -> None:
        """A deadline passed: the worker is suspect; hedge if that can help."""
        peer = self._links.peers.get(attempt.worker)
        if peer is None:
            return
        missed_s = attempt.deadline_s - attempt.sent_s
        attempt.deadline_s = now_s + attempt.allowed_s
        if not peer.suspect:
            self._longest_deadline_s = max(self._longest_deadline_s, missed_s)
            peer.suspect = True
            self._counters["suspicions"] += 1
            self._roster.changed()
        may_hedge = all(group.dropped for group in attempt.groups)
        if may_hedge and self._may_hedge(call, attempt, peer.open, now_s):
            self._counters["hedges"] += 1
            call.state.hedge(attempt)

    def _may_hedge(
        self, call: OpenCall, attempt: Attempt, own: OpenLink | None, now_s: float
    ) -> bool:
        """Whether others hold all of an attempt's experts, are no busier, and the budget allows."""
        planner = self._roster.planner(self._links.peers, now_s)
        if planner is None or not planner.serves(call.state.layer, attempt.pairs.ids_RK):
            return False
        plan = planner.plan(call.state.layer, attempt.pairs.ids_RK)
        others = [self._roster.peer(planned.worker).open for planned in plan.calls]
        if own is None or any(o is None or o.num_calls > own.num_calls for o in others):
            return False
        return self._budget.take(self._outbox.num_messages)

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
        self._inbox.lost.append((opened, self._clock.now_s()))
        self._tell()

    def received(self, peer: Peer, opened: OpenLink, header: Header, frame: ReplyFrame) -> None:
        """See `LinkUser`."""
        if header.kind not in {Kind.REPLY, Kind.STALE}:
            raise DispatchError(f"a message of kind {header.kind} where a reply was due")
        self._inbox.put(Arrived(peer, opened, header, frame, self._clock.now_s()))

    def _tell(self) -> None:
        """Have the model's thread look at what changed, and plan anew."""
        self._roster.changed()
        self._inbox.tell()
        with self._changed:
            self._changed.notify_all()
