"""Where a request goes when its gateway is lost: to its snapshot, and never beyond its client."""

import asyncio

import pytest

from cluster.frontdoor.admission import Job
from cluster.frontdoor.flight import Flight
from cluster.frontdoor.options import FrontDoorOptions
from cluster.ownership.directory import GRANT
from tests.fakes import LoneOwnership
from tests.unit.harness_gateway import make_request
from workers.errors import DrainingError, ExpertmeshError
from workers.placement import MemberId
from workers.types import FinishReason, PrefixPlace, Request, SnapshotPlace, TokenEvent

PREFIX = PrefixPlace(2000, "gateway-9.1")


class FakeSession:
    """A session that notes what is submitted."""

    def __init__(self, name: str) -> None:
        self.member = self  # only its id is asked for
        self.id = MemberId(name, 1)
        self.submitted: list[Request] = []
        self.has_work = asyncio.Event()
        self.is_connected = True

    def submit(self, request: Request, passenger: Flight) -> None:
        self.submitted.append(request)
        self.has_work.set()

    def leave(self, passenger: Flight, *, has_ended: bool) -> None:
        pass

    def let_go(self, request_id: str, assignment: int) -> None:
        pass


class FakePool:
    """Gateways in order of preference; a named holder comes first, if it takes work."""

    def __init__(self, *names: str) -> None:
        self.options = FrontDoorOptions(gateway_wait_s=1.0, gateway_silence_s=0.04)
        self.listeners: set = set()
        self.sessions = [FakeSession(name) for name in names]

    def choose(self, excluding=(), request=None, snapshot=None) -> FakeSession | None:
        open_to_it = [s for s in self.sessions if s.id not in excluding]
        holder = snapshot.holder if snapshot is not None else ""
        held = [s for s in open_to_it if str(s.id) == holder]
        return next(iter(held + open_to_it), None)

    def prefix_for(self, _session: FakeSession, _request: Request) -> PrefixPlace:
        return PREFIX

    def find(self, gateway: str) -> FakeSession | None:
        return next((s for s in self.sessions if str(s.id) == gateway), None)

    def is_gone(self, gateway: MemberId) -> bool:
        return all(session.id != gateway for session in self.sessions)

    def lose(self, session: FakeSession, flight: Flight) -> None:
        self.sessions.remove(session)
        flight.lost()


def event(
    index: int, tokens: tuple[int, ...], assignment: int = 1, *, sequence: int = 0,
    finish: FinishReason | None = None,
) -> TokenEvent:  # fmt: skip
    return TokenEvent(
        request_id="r", sequence_index=sequence, assignment=GRANT + assignment,
        first_token_index=index, token_ids=tokens, finish=finish,
    )  # fmt: skip


def take_off(request: Request, pool: FakePool) -> Flight:
    return Flight(Job(request=request), pool, LoneOwnership())


async def fly(flight: Flight, *notices) -> asyncio.Task:
    """Begin a flight and let it hear."""

    async def run() -> list[TokenEvent]:
        return [e async for e in flight.events()]

    task = asyncio.create_task(run())
    for notice in (None, *notices):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if notice is not None:
            notice()
    for _ in range(10):
        await asyncio.sleep(0)
    return task


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ([], ()),
        ([(3, "c.1")], (3, "c.1")),
        ([(3, "c.1"), (6, "c.1")], (6, "c.1")),
        ([(3, "c.1"), (7, "c.1")], (3, "c.1")),  # ahead: no token would be left to compute
        ([(3, "c.1"), (5, "b.1"), (9, "b.1")], (5, "b.1")),
        ([(7, "c.1"), (8, "c.1")], (1, "c.1")),  # the holder knows whether it has an older one
    ],
)
async def test_the_newest_snapshot_is_used_that_is_not_ahead_of_the_client(
    reported, expected
) -> None:
    pool = FakePool("a", "b", "c")
    flight = take_off(make_request(max_tokens=50), pool)  # 3 prompt tokens
    gateway = pool.sessions[0]
    places = [SnapshotPlace(0, position, holder) for position, holder in reported]
    task = await fly(
        flight,
        lambda: flight.deliver(event(0, (5, 6, 7, 8))),
        *(lambda place=place: flight.held(place) for place in places),
        lambda: pool.lose(gateway, flight),
    )
    holder = expected[1] if expected else "b.1"
    (request,) = next(s for s in pool.sessions if str(s.id) == holder).submitted
    task.cancel()

    assert flight.route == f"a.1@0 {holder}@4"
    assert request.emitted == ((5, 6, 7, 8),)
    assert request.assignment == GRANT + 2
    assert request.snapshots == ((SnapshotPlace(0, *expected),) if expected else ())
    assert request.prefix == (None if expected else PREFIX)


async def test_a_holder_that_is_gone_is_named_to_whoever_takes_the_request() -> None:
    pool = FakePool("a", "b")
    flight = take_off(make_request(max_tokens=50), pool)
    place = SnapshotPlace(0, 2, "c.1")  # in the middle of the prompt
    task = await fly(
        flight, lambda: flight.held(place), lambda: pool.lose(pool.sessions[0], flight)
    )
    task.cancel()

    (request,) = pool.sessions[0].submitted
    assert request.snapshots == (place,)
    assert request.emitted == ()


async def test_a_moved_request_goes_on_at_its_holder_and_not_where_it_was() -> None:
    pool = FakePool("a", "b", "c")
    flight = take_off(make_request(max_tokens=3, num_sequences=2), pool)
    first, _, third = pool.sessions
    task = await fly(
        flight,
        lambda: flight.deliver(event(0, (5,))),
        lambda: flight.deliver(event(0, (6,), sequence=1)),
        lambda: [flight.held(SnapshotPlace(i, 3, "c.1")) for i in range(2)],
        lambda: flight.deliver(event(1, (), finish=FinishReason.MOVED)),
        lambda: flight.deliver(event(1, (), sequence=1, finish=FinishReason.MOVED)),
        lambda: flight.deliver(event(1, (7,))),  # a late word of the one that it left
        lambda: flight.deliver(event(1, (8, 9), 2, finish=FinishReason.LENGTH)),
        lambda: flight.deliver(event(1, (4, 4), 2, sequence=1, finish=FinishReason.LENGTH)),
    )
    events = await task

    assert len(first.submitted) == 1
    (request,) = third.submitted
    assert request.emitted == ((5,), (6,))
    assert [p.position for p in request.snapshots] == [3, 3]
    tokens = [(e.sequence_index, *e.token_ids) for e in events]
    assert tokens == [(0, 5), (1, 6), (0, 8, 9), (1, 4, 4)]
    assert all(e.finish is not FinishReason.MOVED for e in events)


async def test_what_a_gateway_says_of_a_sequence_whose_text_has_ended_is_heard_for_the_others() -> (
    None
):
    pool = FakePool("a", "b")
    flight = take_off(make_request(max_tokens=9, num_sequences=2), pool)
    a, b = pool.sessions
    task = await fly(
        flight,
        lambda: flight.deliver(event(0, (5,))),
        lambda: flight.end_sequence(0),  # by a stop string, of which the gateway knows nothing
        lambda: flight.deliver(event(4, (), finish=FinishReason.MOVED)),
        lambda: flight.deliver(event(0, (6,), 2, sequence=1, finish=FinishReason.LENGTH)),
    )
    await asyncio.wait_for(task, 1.0)

    assert (len(a.submitted), len(b.submitted)) == (1, 1)


async def test_an_error_of_a_sequence_whose_text_has_ended_ends_the_others() -> None:
    pool = FakePool("a", "b")
    flight = take_off(make_request(max_tokens=9, num_sequences=2), pool)
    task = await fly(
        flight,
        lambda: flight.end_sequence(0),
        lambda: flight.deliver(event(4, (), finish=FinishReason.ERROR)),
    )
    with pytest.raises(ExpertmeshError, match="the gateway failed at the request"):
        await asyncio.wait_for(task, 1.0)


async def test_a_gateway_that_refuses_is_no_leg_of_the_route() -> None:
    pool = FakePool("a", "b")
    flight = take_off(make_request(max_tokens=1), pool)
    task = await fly(
        flight,
        lambda: flight.refused(DrainingError("it leaves")),
        lambda: flight.deliver(event(0, (5,), 2, finish=FinishReason.LENGTH)),
    )
    await task

    assert flight.route == "b.1@0"


async def submitted_at(session: FakeSession) -> Request:
    """Wait until a gateway has a request."""
    async with asyncio.timeout(10):
        await session.has_work.wait()
    return session.submitted[-1]


async def test_gateways_that_are_lost_together_are_not_blamed_on_a_request() -> None:
    pool = FakePool("a", "b", "c", "d")
    flight = take_off(make_request(max_tokens=50), pool)
    a, b, c, d = pool.sessions
    task = await fly(
        flight,
        lambda: pool.lose(a, flight),
        lambda: pool.lose(b, flight),
        lambda: pool.sessions.remove(c),
    )
    request = await submitted_at(d)
    task.cancel()

    assert request.deaths == 2
    assert not c.submitted  # it fell silent with them, which was known a moment later


async def test_a_gateway_that_comes_and_goes_puts_no_retry_off() -> None:
    pool = FakePool("a")
    pool.options = FrontDoorOptions(gateway_retry_s=0.3)
    flight = take_off(make_request(max_tokens=50), pool)
    (a,) = pool.sessions
    task = await fly(flight, lambda: flight.refused(DrainingError("it leaves")))
    async with asyncio.timeout(10):
        while len(a.submitted) < 3:  # each retry is later than the one before
            if len(a.submitted) > 1 and flight._session is not None:
                flight.refused(DrainingError("it leaves"))
            for look in list(pool.listeners):
                look()
            await asyncio.sleep(0.005)
    task.cancel()


async def test_a_gateway_that_moves_a_request_and_is_gone_when_no_other_one_is_there() -> None:
    pool = FakePool("a")
    flight = take_off(make_request(max_tokens=50), pool)
    (a,) = pool.sessions

    def move_and_end() -> None:
        flight.deliver(event(1, (), finish=FinishReason.MOVED))
        pool.lose(a, flight)

    task = await fly(flight, lambda: flight.deliver(event(0, (5,))), move_and_end)
    pool.sessions.append(b := FakeSession("b"))
    for look in list(pool.listeners):
        look()
    request = await submitted_at(b)
    task.cancel()

    assert request.emitted == ((5,),)


@pytest.mark.parametrize("how", ["it leaves", "it is lost"])
async def test_a_request_without_a_token_goes_on_by_right_where_its_gateway_is_no_more(how) -> None:
    pool = FakePool("a", "b")
    flight = take_off(make_request(max_tokens=50), pool)
    a, b = pool.sessions

    def leave() -> None:
        if how == "it leaves":
            flight.deliver(event(0, (), finish=FinishReason.MOVED))
        else:
            pool.lose(a, flight)

    task = await fly(flight, leave)
    request = await submitted_at(b)
    task.cancel()

    assert [r.was_admitted for r in (*a.submitted, request)] == [False, True]
