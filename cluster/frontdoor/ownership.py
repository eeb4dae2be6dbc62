"""The claims of one front door: taken before a request runs, renewed where directories move."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from cluster import wire
from cluster.frontdoor.gateways import GatewayPool, GatewaySession
from cluster.ownership.directory import Claim, Grant, grant_of, newest
from cluster.pb.expertmesh.v1 import gateway_pb2
from workers.errors import DuplicateRequestError


class Holder(Protocol):
    """A call that has a request, or wants it."""

    @property
    def claim(self) -> Claim:
        """What it claims now."""
        ...

    def superseded(self) -> None:
        """Another call has taken the request over."""
        ...

    def cancel(self) -> None:
        """Somebody wants the request to end."""
        ...


@dataclass(slots=True)
class _Held:
    holder: Holder
    claim: Claim  # as it was told last
    places: set[GatewaySession]  # where it is known


class Ownership:
    """Claims requests at their directories for the calls of this front door."""

    def __init__(self, pool: GatewayPool) -> None:
        self._pool = pool
        self._held: dict[tuple[str, int], _Held] = {}  # by request id and granted number
        self._asking: set[asyncio.Task[Grant | None]] = set()  # for calls that have gone
        pool.listeners.add(self._follow_directories)
        pool.registrar = self

    async def take(
        self, holder: Holder, *, above: int, held: int, takes_over: bool
    ) -> Grant | None:
        """Ask the directory for a request; None when no directory can be reached.

        `held` is the number that the call has had until now, or 0.

        Raises:
            DuplicateRequestError: Another call that lives has it.
        """
        claim = holder.claim
        self._held.pop((claim.request_id, grant_of(held)), None)
        question = _Question(claim=claim, above=above, held=held, takes_over=takes_over)
        asking = asyncio.create_task(self._ask(question))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:  # a grant that comes now is nobody's
            asking.add_done_callback(partial(self._give_back, claim))
            self._asking.add(asking)
            raise

    def hold(self, holder: Holder) -> None:
        """Tell the directories what a call has now, and again whenever they move."""
        claim = holder.claim
        key = (claim.request_id, grant_of(claim.assignment))
        places = set(self._pool.directories(claim.request_id))
        self._held[key] = _Held(holder, claim, places)
        _renew(places, claim)

    def release(self, claim: Claim) -> None:
        """Give a claim up; directories remember it for its window."""
        held = self._held.pop((claim.request_id, grant_of(claim.assignment)), None)
        if held is not None:
            _release(held.places, claim)

    async def cancel(self, request_id: str) -> bool:
        """End a request, whichever front door has it; returns whether a directory knows it."""
        for session in self._pool.directories(request_id):
            answer = await session.ask(gateway_pb2.CancelClaim(request_id=request_id))
            if answer is None or not answer.is_known:
                continue
            owner = self._pool.find(answer.owner)  # named where no front door has it that could
            if owner is not None:
                owner.let_go(request_id, answer.owner_assignment)
            return True
        return False

    def superseded(self, request_id: str, assignment: int) -> None:
        """Let the call that has lost a request end."""
        held = self._held.pop((request_id, grant_of(assignment)), None)
        if held is not None:
            held.holder.superseded()

    def cancelled(self, request_id: str) -> None:
        """Let the call that has a request end it."""
        for (known_id, _), held in list(self._held.items()):
            if known_id == request_id:
                held.holder.cancel()

    async def _ask(self, question: "_Question") -> Grant | None:
        while sessions := self._pool.directories(question.claim.request_id):
            answer = await sessions[0].ask(question.message())
            if answer is None:
                continue  # it was lost; another one has taken its place
            grant = question.granted(answer)
            for deputy in sessions[1:]:  # knows claims of which the first one has not heard yet
                second = replace(question, above=grant.assignment - 1)
                answer = await deputy.ask(second.message())
                if answer is not None:
                    try:
                        grant = _combined(grant, second.granted(answer))
                    except DuplicateRequestError:
                        _release(sessions[:1], _granted(question.claim, grant))
                        raise
            return grant
        return None

    def _give_back(self, claim: Claim, asking: "asyncio.Task[Grant | None]") -> None:
        self._asking.discard(asking)
        if not asking.cancelled() and asking.exception() is None and (grant := asking.result()):
            _release(self._pool.directories(claim.request_id), _granted(claim, grant))

    def _follow_directories(self) -> None:
        """Renew claims whose directory is another one now, and take them from the former one.

        One that has changed is renewed everywhere: a gateway that is back has not died.
        """
        for held in self._held.values():
            claim = held.holder.claim
            places = set(self._pool.directories(claim.request_id))
            _renew(places if claim != held.claim else places - held.places, claim)
            _release(held.places - places, replace(claim, resume_window_s=0.0, deaths=0))
            held.claim, held.places = claim, places


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What a call asks of a directory."""

    claim: Claim
    above: int
    held: int
    takes_over: bool

    def message(self) -> gateway_pb2.Claim:
        message = wire.claim_message(replace(self.claim, assignment=0))
        message.above = self.above
        message.held = self.held
        message.takes_over = self.takes_over
        return message

    def granted(self, answer: gateway_pb2.Claimed) -> Grant:
        if not answer.assignment:
            raise DuplicateRequestError(
                f"request {self.claim.request_id} is in flight already; send resume_from to take "
                "it over"
            )
        if not answer.is_known:
            return Grant(answer.assignment)
        previous = replace(
            self.claim,
            owner=answer.owner,
            assignment=answer.owner_assignment,
            deaths=answer.deaths,
            died_at=answer.died_at if answer.HasField("died_at") else None,
            snapshot_holder=answer.snapshot_holder,
        )
        return Grant(answer.assignment, previous)


def _combined(first: Grant, second: Grant) -> Grant:
    """Return the higher number, and the newest claim that either directory knew."""
    known = newest([grant.previous for grant in (first, second) if grant.previous is not None])
    return Grant(max(first.assignment, second.assignment), known)


def _granted(claim: Claim, grant: Grant) -> Claim:
    """Return what was granted and is not wanted, so that it can be released."""
    known = grant.previous
    return replace(
        claim,
        assignment=grant.assignment,
        resume_window_s=known.resume_window_s if known else 0.0,
        deaths=known.deaths if known else 0,
        died_at=known.died_at if known else None,
    )


def _renew(sessions: Iterable[GatewaySession], claim: Claim) -> None:
    for session in sessions:
        session.send(gateway_pb2.SessionRequest(claim=wire.claim_message(claim)))


def _release(sessions: Iterable[GatewaySession], claim: Claim) -> None:
    for session in sessions:
        session.send(gateway_pb2.SessionRequest(release=wire.release_message(claim)))
