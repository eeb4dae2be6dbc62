"""Each removes the guard of one invariant, for as long as a context lasts; the lab must notice.

Guards are ordinary methods of production classes: nothing there knows that it may be replaced.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.control import distributor as distributor_module
from cluster.control.controller import Controller
from cluster.control.fence import Fence
from cluster.control.planner import _Board
from cluster.control.replicas import ReplicaBook
from cluster.frontdoor.flight import Flight
from tests.chaos.lab.cluster import SimJournal
from workers.dispatch.exchange import LinkDispatcher
from workers.dispatch.link_set import OpenLink
from workers.dispatch.outbox import Outbox
from workers.dispatch.plan import Planner
from workers.dispatch.recovery import AnswerTimes, Attempt, Group, LayerCall
from workers.dispatch.roster import Roster
from workers.dispatch.suspects import Suspects
from workers.expert.batching import CallQueue
from workers.expert.slots import SlotTable
from workers.gateway.lockstep import Follower, Leader, Outcome


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something in the place of an attribute."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def sum_every_reply() -> Any:
    """I1: the result is the sum of all accepted replies, not of one disjoint cover."""

    def cover(self: LayerCall) -> Iterator[Attempt]:
        return iter(self.accepted)

    return replaced(LayerCall, "cover", cover)


def forget_what_a_reply_left_out() -> Any:
    """I1: a STALE reply counts as whole."""
    original = LayerCall.reply

    def reply(self: LayerCall, message_id: int, worker: Any, incarnation: int, summed_R: Any,
              payload: Any) -> Attempt | None:  # fmt: skip
        attempt = self.outstanding.get(message_id)
        whole = attempt.pairs.masks_R if attempt is not None else summed_R
        return original(self, message_id, worker, incarnation, whole, payload)

    return replaced(LayerCall, "reply", reply)


def blame_whoever_was_there() -> Any:
    """I1: rows are given up for having been with workers that ended, computed alone or not."""
    original = LayerCall.link_lost

    def link_lost(
        self: LayerCall, worker: Any, incarnation: int, computing: int | None = None
    ) -> Any:
        del computing
        for attempt in self.outstanding.values():
            if (attempt.worker, attempt.incarnation) == (worker, incarnation):
                number = attempt.message_id
                self.suspects.shown(worker, attempt.pairs, number, self._newest)
        return original(self, worker, incarnation)

    return replaced(LayerCall, "link_lost", link_lost)


def begin_before_it_is_settled() -> Any:
    """I1: a suspect is computed while the reply to the one before may still be lost."""
    return replaced(CallQueue, "_may_begin", lambda self, now_s: True)


def blame_who_has_answered() -> Any:
    """I1: a worker counts as computing a suspect even after its reply has come."""
    original = OpenLink._say_settled

    def say_settled(self: OpenLink, header: Any) -> None:
        self._begun = header.message_id
        original(self, header)

    return replaced(OpenLink, "_say_settled", say_settled)


def blame_nobody() -> Any:
    """I9: rows that workers end by are sent to the next one, for ever."""
    return replaced(Suspects, "shown", lambda *_: None)


def keep_calls_of_a_lost_link() -> Any:
    """I9: what was sent over a link that broke is still waited for."""
    return replaced(Outbox, "give_up", lambda self, opened, noticed_s: None)


def use_replies_of_any_link() -> Any:
    """I2: a reply is taken whatever link it came over."""
    return replaced(LinkDispatcher, "_is_current", lambda self, peer, opened: True)


def write_without_waiting() -> Any:
    """I3: a slot is unmapped and written while leases that see it are out."""

    def unmap(self: SlotTable, slot: int, timeout_s: float) -> None:
        del timeout_s
        expert = self._expert_of.pop(slot, None)
        if expert is not None:
            self._change(expert, -1)

    return replaced(SlotTable, "unmap", unmap)


def drop_what_nobody_serves() -> Any:
    """I4: pairs without a worker are left out of the call instead of being parked."""
    original = Planner.plan

    def plan(self: Planner, *arguments: Any, **more: Any) -> Any:
        made = original(self, *arguments, **more)
        made.unserved = None
        return made

    return replaced(Planner, "plan", plan)


def leave_lost_experts_unloaded() -> Any:
    """I4: experts without a copy are not loaded elsewhere."""
    original = distributor_module.assign

    def assign(book: ReplicaBook, crew: Any, **more: Any) -> Any:
        if any(book.loaded(w.member.id) for w in crew) and more["rescue_only"]:
            return distributor_module.Assignment()
        made = original(book, crew, **more)
        batches = {m: [x for x in loads if not x.urgent] for m, loads in made.batches.items()}
        served = any(book.loaded(w.member.id) for w in crew)
        return distributor_module.Assignment(batches, made.num_missing) if served else made

    return replaced(distributor_module, "assign", assign)


def overwrite_the_last_loaded_copy() -> Any:
    """I4: a copy that is only about to be loaded counts as one."""

    def num_loaded(self: _Board, expert: Any, without: Any) -> int:
        return sum(worker != without for worker in self.holders[expert])

    return replaced(_Board, "_num_loaded", num_loaded)


def obey_anybody() -> Any:
    """I5: members obey controllers that have been superseded, and those never notice."""
    stack = contextlib.ExitStack()
    stack.enter_context(replaced(Fence, "admit", lambda self, term: None))
    stack.enter_context(replaced(SimJournal, "is_leading", lambda self: True))
    return stack


def adopt_any_view() -> Any:
    """I5: a gateway takes whatever View comes."""

    def adopt(self: Roster, index: Any) -> bool:
        self._index = index
        self._changed = True
        return True

    return replaced(Roster, "adopt", adopt)


def commit_before_it_is_decided() -> Any:
    """I6: a following rank commits what it staged without waiting for the leader's word."""
    original = Follower._compute

    def compute(self: Follower, message: Any) -> None:
        original(self, message)
        self._cache.commit()

    return replaced(Follower, "_compute", compute)


def forget_to_discard() -> Any:
    """I6: the leader does not tell the others that a step was discarded."""

    def discard(self: Leader) -> None:
        self._cache.discard()
        self._outcome = Outcome.COMMIT

    return replaced(Leader, "discard", discard)


def pass_on_what_is_known() -> Any:
    """I7: tokens are passed on whatever the client already has."""

    def take(self: Flight, event: Any) -> list[Any]:
        self._emitted[event.sequence_index].extend(event.token_ids)
        if event.finish is not None:
            self._running.discard(event.sequence_index)
        return [event]

    return replaced(Flight, "_take", take)


def heed_any_assignment() -> Any:
    """I8: a flight listens to gateways that no longer own its request."""
    original = Flight._heed

    def heed(self: Flight, assignment: int, notice: Any) -> list[Any]:
        del assignment
        return original(self, self.assignment, notice)

    return replaced(Flight, "_heed", heed)


def act_before_it_is_journalled() -> Any:
    """I5: a controller has done what its successor does not know of."""

    original = Controller._publish

    def publish(self: Controller) -> bool:
        self._send()
        return original(self)

    return replaced(Controller, "_publish", publish)


def no_deadline() -> Any:
    """I9: a call waits for ever for the worker that it was sent to."""
    return replaced(AnswerTimes, "deadline_s", lambda self, num_rows: 1e9)


def no_hedge() -> Any:
    """I10: a call waits for a suspect worker although others hold its experts."""
    return replaced(LinkDispatcher, "_may_hedge", lambda *_: False)


def hold_parked_rows() -> Any:
    """I9: parked rows are not looked at again when something has changed."""
    original = LayerCall.needs

    def needs(self: LayerCall) -> list[Group]:
        return [g for g in original(self) if g.number == 1 and not g.attempts]

    return replaced(LayerCall, "needs", needs)


@dataclass(frozen=True, slots=True)
class Mutation:
    """A guard that is taken away, and the scenario in which that must show."""

    apply: Callable[[], Any]
    scenario: str = "cluster"


MUTATIONS: dict[str, Mutation] = {
    "I1 sum every reply": Mutation(sum_every_reply),
    "I1 forget what a reply left out": Mutation(forget_what_a_reply_left_out),
    "I1 blame whoever was there": Mutation(blame_whoever_was_there),
    "I1 begin before it is settled": Mutation(begin_before_it_is_settled),
    "I1 blame who has answered": Mutation(blame_who_has_answered),
    "I9 blame nobody": Mutation(blame_nobody),
    "I2 use replies of any link": Mutation(use_replies_of_any_link),
    "I3 write without waiting": Mutation(write_without_waiting),
    "I4 drop what nobody serves": Mutation(drop_what_nobody_serves),
    "I4 leave lost experts unloaded": Mutation(leave_lost_experts_unloaded),
    "I4 overwrite the last loaded copy": Mutation(overwrite_the_last_loaded_copy),
    "I5 obey anybody": Mutation(obey_anybody),
    "I5 adopt any View": Mutation(adopt_any_view),
    "I5 act before it is journalled": Mutation(act_before_it_is_journalled),
    "I6 commit before it is decided": Mutation(commit_before_it_is_decided, "ranks"),
    "I6 forget to discard": Mutation(forget_to_discard, "ranks"),
    "I7 pass on what is known": Mutation(pass_on_what_is_known, "requests"),
    "I8 heed any assignment": Mutation(heed_any_assignment, "requests"),
    "I9 no deadline": Mutation(no_deadline),
    "I9 hold parked rows": Mutation(hold_parked_rows),
    "I9 keep calls of a lost link": Mutation(keep_calls_of_a_lost_link),
    "I10 no hedge": Mutation(no_hedge),
}
