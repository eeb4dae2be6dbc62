"""The gateway's gRPC endpoint: one stream with each front door, beside rank 0 of the gateway.

The engine runs in its own thread and the streams on an event loop; neither waits for the other.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

import grpc
import structlog

from cluster import wire
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from cluster.snapshots import SnapshotServicer, SnapshotSource
from workers.errors import ExpertmeshError
from workers.gateway.snapshot import Snapshot, Stamp
from workers.types import GatewayStats, Request, SnapshotPlace, TokenEvent

_log = structlog.get_logger()

_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


class ServingGateway(Protocol):
    """What the endpoint needs of rank 0 of a gateway. No call may block."""

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped for good; None while it runs."""
        ...

    def submit(
        self,
        request: Request,
        sink: Callable[[Sequence[TokenEvent]], None],
        snapshots: Mapping[int, Snapshot] = ...,
    ) -> None:
        """Take a request; its events go to the sink, from any thread. Raises at once."""
        ...

    def abort(self, request_id: str) -> None:
        """Free a request's sequences; one that is not there is no error."""
        ...

    def stats(self) -> GatewayStats:
        """Return load and counters."""
        ...

    def prefixes(self) -> Mapping[int, int]:
        """Return the digests of prefixes whose states are kept, with their numbers of tokens."""
        ...


class GatewayEndpoint:
    """Serves one gateway to front doors.

    Args:
        worker: Rank 0 of the gateway.
        listen: HOST:PORT; port 0 takes a free one.
        stats_interval_s: How often each front door is told the gateway's load.
        keeper: Keeps the snapshots of other gateways; without one it keeps none.
        source: Finds the snapshots that requests name; without one all are computed again.
    """

    def __init__(
        self,
        worker: ServingGateway,
        listen: str,
        *,
        stats_interval_s: float = 0.25,
        keeper: SnapshotServicer | None = None,
        source: SnapshotSource | None = None,
    ) -> None:
        self._listen = listen
        self._server: grpc.aio.Server | None = None
        self._keeper = keeper
        self._servicer = _Servicer(worker, stats_interval_s, source)

    async def start(self) -> str:
        """Listen, and return HOST:PORT."""
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self._servicer, self._server)
        if self._keeper is not None:
            gateway_pb2_grpc.add_SnapshotServiceServicer_to_server(self._keeper, self._server)
        port = self._server.add_insecure_port(self._listen)
        await self._server.start()
        return f"{self._listen.rpartition(':')[0]}:{port}"

    def report(self, stamp: Stamp, holder: str) -> None:
        """Tell the front door of a request that a snapshot of it is whole. On the loop only."""
        self._servicer.report(stamp, holder)

    async def close(self) -> None:
        """End every stream and stop listening."""
        if self._server is not None:
            await self._server.stop(grace=None)


class _Servicer(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(
        self, worker: ServingGateway, stats_interval_s: float, source: SnapshotSource | None
    ) -> None:
        self._worker = worker
        self._stats_interval_s = stats_interval_s
        self._source = source
        self._sessions: dict[str, _Session] = {}

    def report(self, stamp: Stamp, holder: str) -> None:
        """Tell whichever session has the request."""
        for session in self._sessions.values():
            session.snapshot(stamp, holder)

    async def Session(  # type: ignore[override]  # writes: a broken stream is noticed in here
        self,
        request_iterator: AsyncIterator[gateway_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[gateway_pb2.SessionRequest, gateway_pb2.SessionResponse],
    ) -> None:
        """Serve one front door until its stream, or the gateway, breaks."""
        session = _Session(self._worker, self._source)
        reader = asyncio.create_task(self._read(request_iterator, session))
        reader.add_done_callback(session.reader_ended)
        try:
            await context.write(self._stats())
            while not session.ended:
                report = await session.report(self._stats_interval_s)
                if self._worker.failure is not None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, self._worker.failure)
                await context.write(report or self._stats())
                if report is None and (prefixes := session.prefixes()) is not None:
                    await context.write(prefixes)
        finally:
            reader.cancel()
            session.close()

    async def _read(
        self, commands: AsyncIterator[gateway_pb2.SessionRequest], session: "_Session"
    ) -> None:
        async for command in commands:
            match command.WhichOneof("command"):
                case "hello":
                    older = self._sessions.get(command.hello.front_door)
                    if older is not None:  # its stream is dead, and this end does not know yet
                        older.close()
                    self._sessions[command.hello.front_door] = session
                case "submit":
                    session.submit(command.submit)
                case "abort":
                    session.abort(command.abort)
                case None:
                    pass  # a kind of command that this version does not know

    def _stats(self) -> gateway_pb2.SessionResponse:
        return gateway_pb2.SessionResponse(stats=wire.stats_message(self._worker.stats()))


class _Session:
    """The requests of one front door. All methods but `_sink` run on the event loop."""

    def __init__(self, worker: ServingGateway, source: SnapshotSource | None) -> None:
        self._worker = worker
        self._source = source
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._events: deque[TokenEvent] = deque()
        self._reports: deque[gateway_pb2.SessionResponse] = deque()  # beside events
        self._wake = asyncio.Event()
        self._waking = False
        self._live: dict[str, tuple[int, int]] = {}  # request id to (assignment, sequences left)
        self._prefixes: Mapping[int, int] = {}  # as last reported
        self.ended = False

    def submit(self, command: gateway_pb2.Submit) -> None:
        """Hand a request to the engine, with its snapshots if it names some, or note a refusal."""
        request = wire.request_of(command)
        self._drop(request.request_id)
        if self._source is None or not request.snapshots:
            self._begin(request, {})
            return
        task = asyncio.create_task(self._fetch_and_begin(self._source, request))
        self._fetching[request.request_id] = task
        self._live[request.request_id] = (request.assignment, request.num_sequences)

    def abort(self, command: gateway_pb2.Abort) -> None:
        """Free a request, unless a newer assignment of it is running."""
        assignment, _ = self._live.get(command.request_id, (None, 0))
        if assignment == command.assignment:
            self._drop(command.request_id)

    def snapshot(self, stamp: Stamp, holder: str) -> None:
        """Report a whole snapshot, if it is of one of this session's requests."""
        assignment, _ = self._live.get(stamp.request_id, (None, 0))
        if assignment == stamp.assignment:
            place = SnapshotPlace(stamp.sequence_index, stamp.position, holder)
            report = gateway_pb2.SnapshotReport(
                request_id=stamp.request_id,
                assignment=stamp.assignment,
                place=wire.place_message(place),
            )
            self._reports.append(gateway_pb2.SessionResponse(snapshot=report))
            self._wake.set()

    async def report(self, timeout_s: float) -> gateway_pb2.SessionResponse | None:
        """Return everything that is new as one message, or None when nothing came in time."""
        if not self._reports:
            try:
                await asyncio.wait_for(self._wake.wait(), timeout_s)
            except TimeoutError:
                return None
        if self._reports:
            return self._reports.popleft()
        self._wake.clear()
        self._waking = False  # before the events are taken: later ones wake again
        events = gateway_pb2.TokenEvents()
        while self._events:
            event = self._events.popleft()
            self._count(event)
            events.events.append(wire.event_message(event))
        return gateway_pb2.SessionResponse(events=events) if events.events else None

    def prefixes(self) -> gateway_pb2.SessionResponse | None:
        """Return what changed of the prefixes that the gateway keeps; None for nothing."""
        known, self._prefixes = self._prefixes, self._worker.prefixes()
        changes = wire.prefixes_message(known, self._prefixes)
        return changes and gateway_pb2.SessionResponse(prefixes=changes)

    def reader_ended(self, reader: "asyncio.Task[None]") -> None:
        """Let the stream end when no more commands can come."""
        if not reader.cancelled() and (error := reader.exception()) is not None:
            _log.warning("a front door's stream broke", reason=repr(error))
        self._end()

    def close(self) -> None:
        """Free whatever is still running, and end."""
        for request_id in tuple(self._live):
            self._drop(request_id)
        self._end()

    def _begin(self, request: Request, snapshots: Mapping[int, Snapshot]) -> None:
        try:
            self._worker.submit(request, self._sink, snapshots)
        except ExpertmeshError as error:
            self._refuse(request, error)
        except Exception as error:  # noqa: BLE001  # the client hears of it
            _log.exception("submit failed", request_id=request.request_id)
            self._refuse(request, ExpertmeshError(f"the gateway failed: {error}"))
        else:
            self._live[request.request_id] = (request.assignment, request.num_sequences)

    async def _fetch_and_begin(self, source: SnapshotSource, request: Request) -> None:
        snapshots = await source.find(request)
        del self._fetching[request.request_id]
        self._begin(request, snapshots)

    def _drop(self, request_id: str) -> None:
        """Free a request, wherever it stands; one that is not there is no error."""
        if self._live.pop(request_id, None) is None:
            return
        fetching = self._fetching.pop(request_id, None)
        if fetching is not None:
            fetching.cancel()
        else:
            self._worker.abort(request_id)

    def _end(self) -> None:
        self.ended = True
        self._wake.set()

    def _refuse(self, request: Request, error: ExpertmeshError) -> None:
        self._live.pop(request.request_id, None)
        refusal = wire.refusal_message(request.request_id, request.assignment, error)
        self._reports.append(gateway_pb2.SessionResponse(refusal=refusal))
        self._wake.set()

    def _sink(self, events: Sequence[TokenEvent]) -> None:
        """Take events from the engine's thread; one wake-up covers all until it is answered."""
        self._events.extend(events)
        if self._waking or self.ended:
            return
        self._waking = True
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:
            _log.debug("the endpoint's loop has ended; events are dropped")

    def _count(self, event: TokenEvent) -> None:
        """Forget a request whose sequences have all ended."""
        assignment, left = self._live.get(event.request_id, (None, 0))
        if event.finish is None or assignment != event.assignment:
            return
        if left > 1:
            self._live[event.request_id] = (event.assignment, left - 1)
        else:
            del self._live[event.request_id]
