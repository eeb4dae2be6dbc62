"""Requests on their way through gateways that come and go: I7 and I8.

The production's `Flight` carries each request. Gateways emit tokens that only position decides,
die, freeze, and wake up to send what nobody waits for any more.
"""

import asyncio
from typing import Any

from cluster.frontdoor.admission import Job
from cluster.frontdoor.flight import Flight
from cluster.frontdoor.options import FrontDoorOptions
from tests.chaos.lab.members import ViolationError
from tests.chaos.lab.simulator import Simulator
from tests.fakes import LoneOwnership
from workers.placement import MemberId
from workers.types import FinishReason, Request, Sampling, Stopping, TokenEvent

NUM_TOKENS = 24
NUM_GATEWAYS = 2


class SimSession:
    """A front door's session with one gateway, and what that gateway does."""

    def __init__(self, pool: "SimPool", number: int) -> None:
        self.member = _Member(MemberId(f"gateway-{number}", pool.next_incarnation()))
        self.is_lost = False
        self._pool = pool
        self._simulator = pool.simulator

    def submit(self, request: Request, flight: Any) -> None:
        """Take a request: it goes on where its client's tokens end."""
        self._pool.holders.append((request.assignment, self))
        done = [len(tokens) for tokens in request.emitted] or [0] * request.num_sequences
        self._simulator.start(lambda: self._run(request, flight, done))

    def leave(self, flight: Any, *, has_ended: bool) -> None:
        del flight, has_ended

    def _run(self, request: Request, flight: Flight, done: list[int]) -> None:
        draw = self._simulator.draw
        emitting = list(range(request.num_sequences))
        while emitting:
            self._simulator.sleep(draw.uniform(0.001, 0.02))
            if self.is_lost and draw.random() < 0.1:
                return  # it ends at last; until then it may still speak
            sequence = draw.choice(emitting)
            first, count = done[sequence], min(draw.randrange(1, 4), NUM_TOKENS - done[sequence])
            done[sequence] += count
            finish = FinishReason.LENGTH if done[sequence] == NUM_TOKENS else None
            if finish is not None:
                emitting.remove(sequence)
            event = TokenEvent(
                request_id=request.request_id,
                sequence_index=sequence,
                assignment=request.assignment,
                first_token_index=first,
                token_ids=tuple(range(first, first + count)),
                finish=finish,
            )
            late_s = draw.choice((0.0, 0.0, 0.05)) if self.is_lost else 0.0
            self._simulator.after(late_s, lambda event=event: flight.deliver(event))


class _Member:
    def __init__(self, member: MemberId) -> None:
        self.id = member


class SimPool:
    """The gateways that a front door can reach."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.listeners: set[Any] = set()
        self.options = FrontDoorOptions()
        self.holders: list[tuple[int, SimSession]] = []
        self._incarnation = 0
        self.sessions = [SimSession(self, n) for n in range(NUM_GATEWAYS)]

    def next_incarnation(self) -> int:
        self._incarnation += 1
        return self._incarnation

    def find(self, gateway: str) -> None:
        return None  # what was left behind may go on to speak

    def is_gone(self, gateway: MemberId) -> bool:
        return False  # poison is not this scenario's affair

    def choose(
        self, refused_by: set[MemberId], _request: Request, _holder: str
    ) -> SimSession | None:
        able = [s for s in self.sessions if s.member.id not in refused_by]
        return self.simulator.draw.choice(able) if able else None

    def prefix_for(self, _session: SimSession, _request: Request) -> None:
        return None

    def lose(self, flight: Flight) -> None:
        """A gateway dies or freezes: its session ends, and another one comes in its place."""
        number = self.simulator.draw.randrange(len(self.sessions))
        lost = self.sessions[number]
        lost.is_lost = True
        self.sessions[number] = SimSession(self, number)
        if flight._session is lost:
            flight.lost()


def run_requests(seed: int) -> str:
    """Run one seed; returns the violation, or nothing."""
    simulator = Simulator(seed)
    pool = SimPool(simulator)
    draw = simulator.draw
    request = Request(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=Sampling(),
        stopping=Stopping(max_tokens=NUM_TOKENS),
        num_sequences=draw.choice((1, 2)),
    )
    flight = Flight(Job(request=request), pool, LoneOwnership())  # type: ignore[arg-type]
    client: list[list[int]] = [[] for _ in range(request.num_sequences)]
    finished: list[int] = []

    def serve() -> None:
        """Do what `Flight.events` does, in virtual time."""
        while flight._running:
            if flight._session is None:
                flight._submit()
            try:
                assignment, notice = flight._notices.get_nowait()
            except asyncio.QueueEmpty:
                simulator.sleep(0.005)
                continue
            for event in flight._heed(assignment, notice):
                _take(event)

    def _take(event: TokenEvent) -> None:
        newest = max(assignment for assignment, _ in pool.holders)
        if event.assignment != newest:
            raise ViolationError(f"I8: assignment {event.assignment} speaks where {newest} owns")
        mine = client[event.sequence_index]
        if event.first_token_index != len(mine):
            raise ViolationError(f"I7: token {event.first_token_index} where {len(mine)} was due")
        mine.extend(event.token_ids)
        if mine != list(range(len(mine))):
            raise ViolationError(f"I7: the client has {mine}")
        if event.finish is not None:
            finished.append(event.sequence_index)

    simulator.start(serve)
    for _ in range(3):
        simulator.after(draw.uniform(0.0, 0.4), lambda: pool.lose(flight))
    try:
        if not simulator.run(60.0, lambda: len(finished) == request.num_sequences):
            return f"I9: the request does not end: {client}"
    except ViolationError as violation:
        return str(violation)
    if any(len(tokens) != NUM_TOKENS for tokens in client):
        return f"I7: the client has {[len(t) for t in client]} tokens"
    return ""
