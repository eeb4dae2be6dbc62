"""The gateway's gRPC endpoint: one stream with each front door, beside rank 0 of the gateway.

The engine runs in its own thread and the streams on an event loop; neither waits for the other.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import grpc
import structlog

from cluster import wire
from cluster.ownership.directory import MAX_DEATHS, Claim, Directory
from cluster.ownership.holdings import Holdings, ServingGateway
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from cluster.snapshots import SnapshotServicer, SnapshotSource
from workers.clock import Clock, SystemClock
from workers.errors import ExpertmeshError, IsolatedError, StaleAssignmentError
from workers.gateway.snapshot import Snapshot, Stamp
from workers.types import Request, SnapshotPlace, TokenEvent

_log = structlog.get_logger()

_LAST_WORD_S = 0.2  # for what front doors are told last
_EVENTS_BYTES = 2**20  # of events in one message, and one event more

_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """What can be set at a gateway's endpoint.

    Each front door is told the gateway's load every `stats_interval_s`. No request is kept for
    longer than `max_window_s` without a client; ended ones as long as they have no more than
    `max_kept_tokens` together. A request with which one gateway less than `max_deaths` died runs
    beside no other such one.
    """

    stats_interval_s: float = 0.25
    max_window_s: float = 600.0
    max_kept_tokens: int = 2_000_000
    max_deaths: int = MAX_DEATHS
    tick_s: float = 0.1


class GatewayEndpoint:
    """Serves one gateway to front doors.

    Args:
        worker: Rank 0 of the gateway.
        listen: HOST:PORT; port 0 takes a free one.
        options: Its settings.
        clock: Measures for how long something is kept.
        keeper: Keeps the snapshots of other gateways; without one it keeps none.
        source: Finds the snapshots that requests name; without one all are computed again.
    """

    def __init__(
        self,
        worker: ServingGateway,
        listen: str,
        options: EndpointOptions | None = None,
        *,
        clock: Clock | None = None,
        keeper: SnapshotServicer | None = None,
        source: SnapshotSource | None = None,
    ) -> None:
        self._listen = listen
        self._server: grpc.aio.Server | None = None
        self._keeper = keeper
        self._servicer = _Servicer(
            worker, options or EndpointOptions(), clock or SystemClock(), source
        )

    async def start(self) -> str:
        """Listen, and return HOST:PORT."""
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self._servicer, self._server)
        if self._keeper is not None:
            gateway_pb2_grpc.add_SnapshotServiceServicer_to_server(self._keeper, self._server)
        port = self._server.add_insecure_port(self._listen)
        await self._server.start()
        self._servicer.start()
        return f"{self._listen.rpartition(':')[0]}:{port}"

    def report(self, stamp: Stamp, holder: str) -> None:
        """Tell the front door of a request that a snapshot of it is whole. On the loop only."""
        self._servicer.report(stamp, holder)

    async def close(self) -> None:
        """End every stream and stop listening; what was kept is freed."""
        if self._servicer.refuse_waiting():
            await asyncio.sleep(_LAST_WORD_S)
        if self._server is not None:
            await self._server.stop(grace=None)
        self._servicer.close()


class _Servicer(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(
        self,
        worker: ServingGateway,
        options: EndpointOptions,
        clock: Clock,
        source: SnapshotSource | None,
    ) -> None:
        self._worker = worker
        self._options = options
        self._clock = clock
        self._source = source
        self._fetching: dict[str, _Fetch] = {}
        self._sessions: dict[str, _Session] = {}
        self._directory = Directory()
        self._holdings = Holdings(
            worker,
            self._sink,
            clock,
            max_window_s=options.max_window_s,
            max_kept_tokens=options.max_kept_tokens,
            max_deaths=options.max_deaths,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._emitted: deque[TokenEvent] = deque()
        self._waking = False

    def start(self) -> None:
        """Begin to measure windows, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._ticking = self._loop.create_task(self._tick())

    def close(self) -> None:
        """Free everything."""
        if self._ticking is not None:
            self._ticking.cancel()
        self._loop = None
        for request_id in list(self._fetching):
            self._stop_fetching(request_id)
        self._holdings.clear()

    def report(self, stamp: Stamp, holder: str) -> None:
        """Tell whoever listens to a request that a snapshot of it is whole."""
        place = SnapshotPlace(stamp.sequence_index, stamp.position, holder)
        self._holdings.snapshot(stamp.request_id, stamp.assignment, place)

    async def Session(  # type: ignore[override]  # writes: a broken stream is noticed in here
        self,
        request_iterator: AsyncIterator[gateway_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[gateway_pb2.SessionRequest, gateway_pb2.SessionResponse],
    ) -> None:
        """Serve one front door until its stream, or the gateway, breaks."""
        session = _Session()
        reader = asyncio.create_task(self._read(request_iterator, session))
        reader.add_done_callback(session.reader_ended)
        now_s = asyncio.get_running_loop().time
        due_s = now_s()  # for the next word on the load, which events must not crowd out
        try:
            while not session.ended:
                report = await session.report(due_s - now_s()) if due_s > now_s() else None
                if self._worker.failure is not None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, self._worker.failure)
                if report is None:
                    report, due_s = self._stats(), now_s() + self._options.stats_interval_s
                await context.write(report)
        finally:
            reader.cancel()
            self._close(session)

    async def _read(
        self, commands: AsyncIterator[gateway_pb2.SessionRequest], session: "_Session"
    ) -> None:
        async for command in commands:
            if not session.ended:
                self._obey(command, session)

    def _obey(self, command: gateway_pb2.SessionRequest, session: "_Session") -> None:
        match command.WhichOneof("command"):
            case "hello":
                self._greet(command.hello, session)
            case "submit":
                self._submit(command.submit, session)
            case "abort":
                self._stop_fetching(command.abort.request_id, command.abort.assignment)
                self._holdings.abort(command.abort.request_id, command.abort.assignment)
            case "detach":
                self._begin_without(command.detach.request_id, command.detach.assignment)
                self._holdings.detach(command.detach.request_id, command.detach.assignment)
            case "claim" if command.claim.assignment:
                self._tell(self._directory.renew(wire.claim_of(command.claim, session.front_door)))
            case "claim":
                self._ask(command.claim, session)
            case "release":
                claim = wire.released_of(command.release, session.front_door)
                self._directory.release(claim, self._clock.now_s())
            case "cancel":
                self._cancel(command.cancel, session)
            case None:
                pass  # a kind of command that this version does not know

    def _greet(self, hello: gateway_pb2.Hello, session: "_Session") -> None:
        older = self._sessions.get(hello.front_door)
        if older is not None:  # its stream is dead, and this end does not know yet
            self._close(older)
        session.front_door = hello.front_door
        self._sessions[hello.front_door] = session

    def _submit(self, command: gateway_pb2.Submit, session: "_Session") -> None:
        """Run or attach a request, after fetching its snapshots if it names some."""
        request = wire.request_of(command)
        self._stop_fetching(request.request_id, request.assignment)
        if (newer := self._fetching.get(request.request_id)) is not None:
            held = newer.request.assignment
            stale = StaleAssignmentError(f"assignment {held} of the request is here", held)
            session.refuse(request.request_id, request.assignment, stale)
            return
        is_elsewhere = request.snapshots or request.prefix
        if self._source is None or not is_elsewhere or request.request_id in self._holdings:
            self._begin(request, session, {})
            return
        try:
            self._holdings.check_isolation(request)  # who is to wait needs no snapshots yet
        except IsolatedError as error:
            session.refuse(request.request_id, request.assignment, error)
            return
        task = asyncio.create_task(self._fetch_and_begin(self._source, request, session))
        self._fetching[request.request_id] = _Fetch(request, session, task)

    async def _fetch_and_begin(
        self, source: SnapshotSource, request: Request, session: "_Session"
    ) -> None:
        try:
            snapshots = await source.find(request)
        except Exception as error:  # noqa: BLE001 - the request can be computed without them
            _log.error("snapshots are not looked for", why=repr(error))
            snapshots = {}
        del self._fetching[request.request_id]
        self._begin(request, session, snapshots)

    def _stop_fetching(self, request_id: str, assignment: int | None = None) -> None:
        """Forget a request that waits for its snapshots, unless a newer assignment of it does."""
        fetch = self._fetching.get(request_id)
        held = fetch.request.assignment if fetch is not None else 0
        if fetch is not None and (assignment is None or held <= assignment):
            del self._fetching[request_id]
            fetch.task.cancel()

    def _begin_without(self, request_id: str, assignment: int | None = None) -> None:
        """Forget a request that waits for its snapshots, or let it begin if it is to go on."""
        fetch = self._fetching.get(request_id)
        self._stop_fetching(request_id, assignment)
        if fetch is None or request_id in self._fetching:
            return
        if fetch.request.resume_window_s and fetch.request.prefix is not None:
            self._begin(fetch.request, fetch.session, {})

    def refuse_waiting(self) -> bool:
        """Send away who waits for snapshots, once the gateway takes no more; whether any did."""
        waiting = list(self._fetching.values())
        for fetch in waiting:
            self._stop_fetching(fetch.request.request_id)
            self._begin(fetch.request, fetch.session, {})
        return bool(waiting)

    def _begin(
        self, request: Request, session: "_Session", snapshots: Mapping[int, Snapshot]
    ) -> None:
        try:
            self._holdings.submit(request, session, snapshots)
        except ExpertmeshError as error:
            session.refuse(request.request_id, request.assignment, error)
        except Exception as error:  # noqa: BLE001  # the client hears of it
            _log.exception("submit failed", request_id=request.request_id)
            failure = ExpertmeshError(f"the gateway failed: {error}")
            session.refuse(request.request_id, request.assignment, failure)

    def _ask(self, message: gateway_pb2.Claim, session: "_Session") -> None:
        """Answer who asks for a request; tell who has lost it."""
        grant = self._directory.ask(
            wire.claim_of(message, session.front_door),
            above=message.above,
            held=message.held,
            takes_over=message.takes_over,
        )
        if grant.assignment:
            self._tell(grant.previous)
        session.answer(message.ticket, grant.assignment, grant.previous)

    def _cancel(self, message: gateway_pb2.CancelClaim, session: "_Session") -> None:
        """Let the front door that has a request end it; if none has, the asking one will."""
        claim = self._directory.find(message.request_id)
        if claim is not None and self._directory.is_held(message.request_id):
            holder = self._sessions.get(claim.front_door)
            if holder is not None:
                holder.cancelled(message.request_id)
                claim = replace(claim, owner="")
        session.answer(message.ticket, 0, claim)

    def _tell(self, loser: Claim | None) -> None:
        """Let the front door whose claim was lost know it."""
        session = self._sessions.get(loser.front_door) if loser is not None else None
        if session is not None and loser is not None:
            session.superseded(loser.request_id, loser.assignment)

    def _close(self, session: "_Session") -> None:
        session.end()
        for request_id, fetch in list(self._fetching.items()):
            if fetch.session is session:
                self._begin_without(request_id)
        if self._sessions.get(session.front_door) is session:
            del self._sessions[session.front_door]
            self._directory.front_door_gone(session.front_door, self._clock.now_s())
        self._holdings.listener_gone(session)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._options.tick_s)
            self._holdings.tick()
            self._directory.tick(self._clock.now_s())
            kept = self._worker.prefixes()
            for session in self._sessions.values():
                session.prefixes(kept)

    def _sink(self, events: Sequence[TokenEvent]) -> None:
        """Take events from the engine's thread; one wake-up covers all until it is answered."""
        self._emitted.extend(events)
        loop = self._loop
        if self._waking or loop is None:
            return
        self._waking = True
        try:
            loop.call_soon_threadsafe(self._take)
        except RuntimeError:
            _log.debug("the endpoint's loop has ended; events are dropped")

    def _take(self) -> None:
        self._waking = False  # before the events are taken: later ones wake again
        events = []
        while self._emitted:
            events.append(self._emitted.popleft())
        self._holdings.take(events)

    def _stats(self) -> gateway_pb2.SessionResponse:
        return gateway_pb2.SessionResponse(stats=wire.stats_message(self._worker.stats()))


@dataclass(frozen=True, slots=True)
class _Fetch:
    """A request that waits for its snapshots."""

    request: Request
    session: "_Session"
    task: asyncio.Task[None]


class _Session:
    """What one front door is still to be told."""

    def __init__(self) -> None:
        self.front_door = ""
        self._prefixes: Mapping[int, int] = {}  # as last told
        self.ended = False
        self._events: list[TokenEvent] = []
        self._reports: deque[gateway_pb2.SessionResponse] = deque()
        self._wake = asyncio.Event()

    def push(self, events: Iterable[TokenEvent]) -> None:
        """Tell new tokens."""
        self._events.extend(events)
        self._wake.set()

    def refuse(self, request_id: str, assignment: int, error: ExpertmeshError) -> None:
        """Tell why a request is not taken."""
        refusal = wire.refusal_message(request_id, assignment, error)
        self._say(gateway_pb2.SessionResponse(refusal=refusal))

    def held(self, request_id: str, assignment: int, place: SnapshotPlace) -> None:
        """Tell where a snapshot is whole now."""
        report = gateway_pb2.SnapshotReport(
            request_id=request_id, assignment=assignment, place=wire.place_message(place)
        )
        self._say(gateway_pb2.SessionResponse(snapshot=report))

    def superseded(self, request_id: str, assignment: int) -> None:
        """Tell that another call has taken a request over."""
        refusal = gateway_pb2.Refusal(
            request_id=request_id,
            assignment=assignment,
            reason=gateway_pb2.REFUSAL_REASON_SUPERSEDED,
        )
        self._say(gateway_pb2.SessionResponse(refusal=refusal))

    def answer(self, ticket: int, assignment: int, known: Claim | None) -> None:
        """Answer a question to the directory."""
        claimed = wire.claimed_message(ticket, assignment, known)
        self._say(gateway_pb2.SessionResponse(claimed=claimed))

    def cancelled(self, request_id: str) -> None:
        """Tell that somebody wants a request to end."""
        cancelled = gateway_pb2.Cancelled(request_id=request_id)
        self._say(gateway_pb2.SessionResponse(cancelled=cancelled))

    async def report(self, timeout_s: float) -> gateway_pb2.SessionResponse | None:
        """Return the next message, or None when there is nothing new in time."""
        if not (self._reports or self._events):
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), timeout_s)
            except TimeoutError:
                return None
        if self._reports:
            return self._reports.popleft()
        if not self._events:
            return None
        return gateway_pb2.SessionResponse(events=self._some_events())

    def _some_events(self) -> gateway_pb2.TokenEvents:
        """Take the events that come next off the list, as many as a message should hold."""
        messages: list[gateway_pb2.TokenEvent] = []
        num_bytes = 0
        for event in self._events:
            if num_bytes >= _EVENTS_BYTES:
                break
            messages.append(wire.event_message(event))
            num_bytes += messages[-1].ByteSize()
        del self._events[: len(messages)]
        return gateway_pb2.TokenEvents(events=messages)

    def prefixes(self, kept: Mapping[int, int]) -> None:
        """Tell what changed of the prefixes that the gateway keeps."""
        known, self._prefixes = self._prefixes, kept
        changes = wire.prefixes_message(known, kept)
        if changes is not None:
            self._say(gateway_pb2.SessionResponse(prefixes=changes))

    def reader_ended(self, reader: "asyncio.Task[None]") -> None:
        """Let the stream end when no more commands can come."""
        if not reader.cancelled() and (error := reader.exception()) is not None:
            _log.warning("a front door's stream broke", reason=repr(error))
        self.end()

    def end(self) -> None:
        """Let the stream end."""
        self.ended = True
        self._wake.set()

    def _say(self, report: gateway_pb2.SessionResponse) -> None:
        self._reports.append(report)
        self._wake.set()
