"""A request on its way through gateways that come and go: every token once, in order."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from enum import Enum
from typing import NoReturn

import structlog

from cluster.frontdoor.admission import Job
from cluster.frontdoor.gateways import GatewayPool, GatewaySession
from cluster.frontdoor.ownership import Ownership
from cluster.frontdoor.tenure import Tenure
from workers.clock import Clock, SystemClock
from workers.errors import (
    DrainingError,
    DuplicateRequestError,
    ExpertmeshError,
    IsolatedError,
    OverloadedError,
    StaleAssignmentError,
    UnavailableError,
)
from workers.placement import MemberId
from workers.types import FinishReason, SnapshotPlace, TokenEvent

_log = structlog.get_logger()

ROUTE_KEY = "expertmesh-route"  # of a call's trailing metadata; see `Flight.route`

_MOST_LEGS = 32  # that are told: metadata has its bounds
_PLACES = 4  # remembered of each sequence; a holder keeps two
_MOST_ROUNDS = 3  # after which a request that all refuse is not sent more seldom
_SILENCES = 1.25  # of a gateway, until all that fell silent with another one are known to be lost


class _Notice(Enum):
    """What a flight hears beside events and refusals."""

    LOST = "the gateway can no longer be reached"
    CANCELLED = "the client has asked to end it"
    SUPERSEDED = "another call has taken the request over"
    LOOK = "a gateway has come or gone"


class Flight:
    """Carries one request from gateway to gateway until all its sequences have ended.

    It has the request by a claim at the directory. Every submission has a higher assignment number;
    what an older one still sends is dropped.
    """

    def __init__(
        self, job: Job, pool: GatewayPool, ownership: Ownership, clock: Clock | None = None
    ) -> None:
        request = self._request = job.request
        self.request_id = request.request_id
        self._pool = pool
        self._clock = clock or SystemClock()
        self._tenure = Tenure(job, pool, ownership, on_lost=self._superseded, on_cancel=self.cancel)
        self._notices: asyncio.Queue[tuple[int, TokenEvent | ExpertmeshError | _Notice]]
        self._notices = asyncio.Queue()
        self._emitted = [list(tokens) for tokens in request.emitted]
        self._emitted += [[] for _ in range(request.num_sequences - len(self._emitted))]
        self._running = set(range(request.num_sequences))
        self._at_gateway: set[int] = set()  # sequences that the gateway still holds
        self._session: GatewaySession | None = None
        self._refused_by: set[MemberId] = set()
        self._places: dict[int, list[SnapshotPlace]] = {}  # by sequence, the newest last
        self._legs: list[tuple[MemberId, int]] = []
        self._is_admitted = job.is_resumed
        self._was_at_gateway = False  # that has left or was lost since: not by the client's word
        self._has_prompt_logprobs = False
        self._deadline_s: float | None = None
        self._lost_s: float | None = None  # when a gateway was lost last
        self._num_rounds = 0  # in which every gateway has refused it, since it last had a place
        self._round_ends_s: float | None = None  # when all of them are asked again
        self._isolated_s: float | None = None  # since when it waits for another suspect

    @property
    def assignment(self) -> int:
        """The number of the newest submission; events of an older one are dropped."""
        return self._tenure.assignment

    @property
    def route(self) -> str:
        """The gateways that took it, each @ the tokens that were known by then: `a.1@0 b.2@57`.

        Of several running sequences those of the one that had the fewest.
        """
        return " ".join(
            f"{gateway}@{num_tokens}" for gateway, num_tokens in self._legs[-_MOST_LEGS:]
        )

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """Yield the request's events until all its sequences have ended.

        Raises:
            UnavailableError: No gateway took it in time.
            OverloadedError: Every gateway's queue is full, and it was never admitted.
            DuplicateRequestError: Another call has it, or has taken it over.
            ExpertmeshError: The gateway refuses it or has failed at it.
        """
        self._pool.listeners.add(self._look)
        try:
            while self._running:
                if self._session is None:
                    await self._embark()
                for event in await self._hear():
                    yield event
        except ExpertmeshError:
            self._running.clear()  # the client is told: it is not waited for
            raise
        finally:
            self._pool.listeners.discard(self._look)
            self._end()

    def end_sequence(self, sequence_index: int) -> None:
        """Take no more tokens of a sequence: its text has ended."""
        self._running.discard(sequence_index)

    def cancel(self) -> None:
        """End the sequences that are still running, with FinishReason.CANCELLED."""
        self._notices.put_nowait((self.assignment, _Notice.CANCELLED))

    def deliver(self, event: TokenEvent) -> None:
        """Take new tokens."""
        self._notices.put_nowait((event.assignment, event))

    def refused(self, error: ExpertmeshError) -> None:
        """The gateway does not take it."""
        self._notices.put_nowait((self.assignment, error))

    def held(self, place: SnapshotPlace) -> None:
        """A snapshot is whole: the newest is used that is not ahead of what the client has."""
        known = self._places.setdefault(place.sequence_index, [])
        self._places[place.sequence_index] = [*known, place][-_PLACES:]
        self._tenure.kept_at(place.holder)

    def lost(self) -> None:
        """The gateway can no longer be reached."""
        self._notices.put_nowait((self.assignment, _Notice.LOST))

    def _superseded(self) -> None:
        self._notices.put_nowait((self.assignment, _Notice.SUPERSEDED))

    def _look(self) -> None:
        if self._session is None:
            self._notices.put_nowait((self.assignment, _Notice.LOOK))

    async def _embark(self) -> None:
        """Hand the request to a gateway, if this call has it and there is one."""
        if await self._tenure.begin() and not self._waits_for_others():
            self._submit()

    def _waits_for_others(self) -> bool:
        """Whether gateways may be lost together, of which not all are known to be lost yet.

        The next loss would be blamed on the request, so it is not taken to one of those.
        """
        return self._others_s() > 0 and self._tenure.is_suspect

    def _others_s(self) -> float:
        """Return for how long other gateways that fell silent just then may still seem to live."""
        if self._lost_s is None:
            return 0.0
        until_s = self._lost_s + self._pool.options.gateway_silence_s * _SILENCES
        return until_s - self._clock.now_s()

    def _submit(self) -> None:
        """Hand the request to a gateway, if there is one, with what was emitted so far."""
        places = self._usable_places()
        session = self._choose(places[-1] if places else None)
        if session is None:
            return
        self._session = session
        self._tenure.reached(self._fewest_tokens())
        self._at_gateway = set(range(self._request.num_sequences))
        request = replace(
            self._request,
            assignment=self._tenure.count(),
            emitted=tuple(map(tuple, self._emitted)) if any(self._emitted) else (),
            snapshots=places,
            prefix=None if places else self._pool.prefix_for(session, self._request),
            was_admitted=self._was_at_gateway,
            deaths=self._tenure.num_deaths,
        )
        self._legs.append((session.member.id, self._fewest_tokens()))
        session.submit(request, self)
        self._tenure.submitted(session)

    def _choose(self, snapshot: SnapshotPlace | None) -> GatewaySession | None:
        """Return the gateway that has the request, else the one where it is likely to end first."""
        former = self._tenure.former
        if former is not None and former.is_connected and former.member.id not in self._refused_by:
            return former
        return self._pool.choose(self._refused_by, self._request, snapshot)

    def _fewest_tokens(self) -> int:
        return min((len(self._emitted[index]) for index in self._running), default=0)

    def _usable_places(self) -> tuple[SnapshotPlace, ...]:
        """Return where the newest snapshot of each running sequence is that it may go on from."""
        num_prompt = len(self._request.prompt_token_ids)
        found = []
        for index in sorted(self._running):
            num_tokens = num_prompt + len(self._emitted[index])
            fitting = [p for p in self._places.get(index, ()) if p.position < num_tokens]
            holder = self._tenure.snapshot_holder
            if not fitting and holder:  # known from the call before; the holder knows how far it is
                fitting = [SnapshotPlace(index, 1, holder)]
            found += fitting[-1:]
        return tuple(found)

    async def _hear(self) -> list[TokenEvent]:
        """Wait for a notice and act on it; return what it brings for the client."""
        if self._session is not None:
            return self._heed(*await self._notices.get())
        now_s = asyncio.get_running_loop().time()
        wait_s = self._pool.options.gateway_wait_s
        self._deadline_s = self._deadline_s or now_s + wait_s
        if now_s >= self._deadline_s:
            raise UnavailableError(f"no gateway could take the request within {wait_s:g} s")
        until_s = self._deadline_s
        if self._refused_by:
            until_s = min(until_s, self._round_end(now_s))
        if self._waits_for_others():
            until_s = min(until_s, now_s + self._others_s())
        try:
            async with asyncio.timeout_at(until_s):
                notice = await self._notices.get()
        except TimeoutError:
            self._num_rounds += bool(self._refused_by)
            self._ask_all_again()
            return []
        return self._heed(*notice)

    def _round_end(self, now_s: float) -> float:
        """Return when a request that all have refused is sent again: its prompt may be long.

        That stands whatever is heard until then: one that is out of reach is heard of often.
        """
        if self._round_ends_s is None:
            doublings = min(self._num_rounds, _MOST_ROUNDS)
            self._round_ends_s = now_s + self._pool.options.gateway_retry_s * (1 << doublings)
        return self._round_ends_s

    def _ask_all_again(self) -> None:
        self._refused_by.clear()
        self._round_ends_s = None

    def _heed(
        self, assignment: int, notice: TokenEvent | ExpertmeshError | _Notice
    ) -> list[TokenEvent]:
        if notice is _Notice.SUPERSEDED:
            self._lose()
        if notice is _Notice.CANCELLED:
            return [self._cancelled(index) for index in sorted(self._running)]
        if assignment != self.assignment or notice is _Notice.LOOK:
            return []
        if isinstance(notice, TokenEvent):
            return self._take(notice)
        if self._session is None:
            return []  # it was left already, as it has moved
        if isinstance(notice, ExpertmeshError):
            self._refuse(notice)
        else:
            self._lost()
        return []

    def _lose(self) -> NoReturn:
        """Leave the request to the call that has taken it over, and its gateway too."""
        if self._session is not None:
            self._session.leave(self, has_ended=True)
        self._session = None
        raise DuplicateRequestError(f"request {self.request_id} goes on in a later call")

    def _lost(self) -> None:
        assert self._session is not None
        self._tenure.lost_at(self._session.member.id, self._fewest_tokens())
        self._session, self._is_admitted, self._was_at_gateway = None, True, True
        self._deadline_s, self._lost_s = None, self._clock.now_s()

    def _refuse(self, error: ExpertmeshError) -> None:
        """Try another gateway, where that may help; else raise the refusal."""
        assert self._session is not None
        gateway = self._session.member.id
        self._session = None
        self._legs.pop()
        if isinstance(error, StaleAssignmentError):
            self._tenure.doubted(error.held)
            return
        self._refused_by.add(gateway)
        match error:
            case DrainingError():
                return
            case IsolatedError():
                self._deadline_s = None  # it waits for the other one's end
                self._isolated(error)
                return
            case OverloadedError():
                if self._is_admitted or self._pool.choose(self._refused_by) is not None:
                    return
            case DuplicateRequestError() if self._is_admitted:
                return  # an older assignment of it is still being freed there
        raise error

    def _isolated(self, error: IsolatedError | None) -> None:
        """Have it known that a suspect waits for another one, and for how long it has."""
        now_s = self._clock.now_s()
        if error is not None and self._isolated_s is None:
            self._isolated_s = now_s
            deaths = self._tenure.num_deaths
            _log.info("a suspect waits", request_id=self.request_id, deaths=deaths, why=str(error))
        elif error is None and self._isolated_s is not None:
            waited_s = round(now_s - self._isolated_s, 3)
            _log.info("a suspect goes on", request_id=self.request_id, waited_s=waited_s)
            self._isolated_s = None

    def _take(self, event: TokenEvent) -> list[TokenEvent]:
        """Return what is new in an event, if anything; what is not is dropped."""
        if event.finish is not None:
            self._at_gateway.discard(event.sequence_index)
        if not self._running or self._is_left(event):
            return []
        if event.sequence_index not in self._running:
            return []
        emitted = self._emitted[event.sequence_index]
        num_known = len(emitted) - event.first_token_index
        if num_known < 0:
            self._leave()
            return []
        fresh = replace(
            event,
            first_token_index=len(emitted),
            token_ids=event.token_ids[num_known:],
            logprobs=event.logprobs[num_known:],
            prompt_logprobs=() if self._has_prompt_logprobs else event.prompt_logprobs,
        )
        if not (fresh.token_ids or fresh.prompt_logprobs or fresh.finish):
            return []
        emitted.extend(fresh.token_ids)
        self._is_admitted, self._deadline_s = True, None
        self._ask_all_again()
        self._num_rounds = 0
        self._isolated(None)
        self._has_prompt_logprobs |= bool(fresh.prompt_logprobs)
        if fresh.finish is not None:
            self._running.discard(fresh.sequence_index)
        return [fresh]

    def _is_left(self, event: TokenEvent) -> bool:
        """Leave the gateway if it says that it has, or give up.

        What it says so of one sequence holds for all, also of one whose text ended here before.
        """
        if event.finish is FinishReason.ERROR:
            raise ExpertmeshError(f"the gateway failed at the request: {event.error}")
        if event.finish not in {FinishReason.CANCELLED, FinishReason.MOVED}:
            return False
        if event.finish is FinishReason.MOVED:
            self._is_admitted, self._was_at_gateway, self._deadline_s = True, True, None
            if self._session is not None:  # else it was lost as well
                self._refused_by.add(self._session.member.id)
        self._leave()
        return True

    def _cancelled(self, sequence_index: int) -> TokenEvent:
        self._running.discard(sequence_index)
        return TokenEvent(
            request_id=self.request_id,
            sequence_index=sequence_index,
            assignment=self.assignment,
            first_token_index=len(self._emitted[sequence_index]),
            token_ids=(),
            finish=FinishReason.CANCELLED,
        )

    def _leave(self) -> None:
        """Let the gateway free whatever it still holds of it."""
        if self._session is not None:
            self._session.leave(self, has_ended=not self._at_gateway)
            self._session = None

    def _end(self) -> None:
        """Give the request up: what a client may come back for is kept for its window."""
        is_gone = bool(self._running)  # the client is
        has_ended = not self._running and not self._at_gateway
        window_s = self._request.resume_window_s if is_gone or has_ended else 0.0
        if is_gone and window_s and self._session is not None:
            self._session.detach(self)
            self._session = None
        self._leave()
        self._tenure.end(keep_s=window_s, has_ended_well=has_ended)
