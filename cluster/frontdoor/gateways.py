"""Connections to gateways: one session with each, and the choice between them."""

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import grpc
import structlog

from cluster import wire
from cluster.frontdoor.options import FrontDoorOptions
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from workers.errors import ExpertmeshError
from workers.gateway.prefix_digest import prefix_digests
from workers.placement import Member, MemberId, MemberState, Role, View
from workers.types import GatewayStats, Request, SnapshotPlace, TokenEvent

_log = structlog.get_logger()

# A process that dies is noticed at once; a peer that falls silent, by keepalive.
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLoad:
    """What the choice of a gateway looks at.

    `outstanding_tokens` are promised and not yet delivered; `cached_tokens` of the prompt in
    question need not be computed there.
    """

    id: MemberId
    outstanding_tokens: int
    cached_tokens: int = 0


def choose_gateway(
    loads: Iterable[GatewayLoad], excluding: Collection[MemberId] = ()
) -> MemberId | None:
    """Return the gateway with the fewest tokens ahead of a request's end; None if there is none.

    What is cached counts like tokens that are delivered already, so that a prefix which everybody
    shares draws requests to its gateway only until that one is busier by as much.
    """
    open_to_it = [load for load in loads if load.id not in excluding]
    if not open_to_it:
        return None
    return min(
        open_to_it, key=lambda load: (load.outstanding_tokens - load.cached_tokens, load.id)
    ).id


class Passenger(Protocol):
    """A request that a session carries; hears of events, of a refusal, and of the session's end."""

    @property
    def request_id(self) -> str:
        """The id under which the gateway knows it."""
        ...

    @property
    def assignment(self) -> int:
        """The number of its present owner; events of another one are not for it."""
        ...

    def deliver(self, event: TokenEvent) -> None:
        """Take new tokens."""
        ...

    def refused(self, error: ExpertmeshError) -> None:
        """The gateway does not take it."""
        ...

    def held(self, place: SnapshotPlace) -> None:
        """A snapshot of it is whole somewhere."""
        ...

    def lost(self) -> None:
        """The gateway can no longer be reached."""
        ...


@dataclass(slots=True)
class _Seat:
    passenger: Passenger
    weight_tokens: int


class GatewaySession:
    """The stream with one gateway, opened again whenever it breaks."""

    def __init__(
        self, member: Member, options: FrontDoorOptions, on_change: Callable[[], None]
    ) -> None:
        self.member = member
        self.stats: GatewayStats | None = None
        self.is_connected = False
        self._options = options
        self._on_change = on_change
        self._prefixes: dict[int, int] = {}  # digests with their numbers of tokens
        self._seats: dict[str, _Seat] = {}
        self._outgoing: asyncio.Queue[gateway_pb2.SessionRequest] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    @property
    def takes_work(self) -> bool:
        """Whether new requests may be sent to it."""
        return self.is_connected and self.member.state is MemberState.ACTIVE

    def load(self, request: Request | None = None) -> GatewayLoad:
        """Return what the choice of a gateway for a request looks at."""
        return GatewayLoad(
            id=self.member.id,
            outstanding_tokens=sum(seat.weight_tokens for seat in self._seats.values()),
            cached_tokens=0 if request is None else self._cached_tokens(request),
        )

    def submit(self, request: Request, passenger: Passenger) -> None:
        """Send a request; its events are delivered to the passenger."""
        completion = min(request.stopping.max_tokens, self._options.expected_tokens)
        uncached = len(request.prompt_token_ids) - self._cached_tokens(request)
        weight = uncached + request.num_sequences * completion
        self._seats[request.request_id] = _Seat(passenger, weight)
        self._send(gateway_pb2.SessionRequest(submit=wire.submit_message(request)))

    def leave(self, passenger: Passenger, *, has_ended: bool) -> None:
        """Forget a request; the gateway frees it at once unless it has ended there."""
        if self._seats.pop(passenger.request_id, None) is not None and not has_ended:
            abort = gateway_pb2.Abort(
                request_id=passenger.request_id, assignment=passenger.assignment
            )
            self._send(gateway_pb2.SessionRequest(abort=abort))

    async def close(self) -> None:
        """End the stream; its requests are lost to it."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _cached_tokens(self, request: Request) -> int:
        """Return the length of the longest prefix of a prompt whose state the gateway keeps."""
        prompt = request.prompt_token_ids
        lengths = sorted({n for n in self._prefixes.values() if n < len(prompt)})
        cached = (
            length
            for length, digest in prefix_digests(request.cache_salt, prompt, lengths)
            if digest in self._prefixes
        )
        return max(cached, default=0)

    def _send(self, command: gateway_pb2.SessionRequest) -> None:
        self._outgoing.put_nowait(command)

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(
            self.member.endpoint, options=_CHANNEL_OPTIONS
        ) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            while True:
                await self._serve(stub)
                await asyncio.sleep(self._options.reconnect_s)

    async def _serve(self, stub: "gateway_pb2_grpc.GatewayServiceAsyncStub") -> None:
        """Open the stream and read it until it breaks."""
        reason = ""  # this end closes it
        self._outgoing = asyncio.Queue()
        self._send(
            gateway_pb2.SessionRequest(hello=gateway_pb2.Hello(front_door=self._options.name))
        )
        call = stub.Session()  # type: ignore[call-arg]  # commands are written, not iterated
        writer = asyncio.create_task(self._write(call))
        try:
            async for response in call:
                self._receive(response)
            reason = "the gateway ended the stream"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            writer.cancel()
            call.cancel()
            self._disconnected(reason)

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[gateway_pb2.SessionRequest, gateway_pb2.SessionResponse],
    ) -> None:
        while True:
            command = await self._outgoing.get()
            try:
                await call.write(command)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader sees why

    def _receive(self, response: gateway_pb2.SessionResponse) -> None:
        if not self.is_connected:
            self.is_connected = True
            _log.info("gateway connected", gateway=str(self.member.id))
            self._on_change()
        match response.WhichOneof("report"):
            case "stats":
                self.stats = wire.stats_of(response.stats)
            case "prefixes":
                wire.update_prefixes(self._prefixes, response.prefixes)
            case "events":
                for message in response.events.events:
                    if passenger := self._passenger(message.request_id, message.assignment):
                        passenger.deliver(wire.event_of(message))
            case "refusal":
                self._refused(response.refusal)
            case "snapshot":
                report = response.snapshot
                if passenger := self._passenger(report.request_id, report.assignment):
                    passenger.held(wire.place_of(report.place))
            case None:
                pass  # a kind of report that this version does not know

    def _refused(self, refusal: gateway_pb2.Refusal) -> None:
        if passenger := self._passenger(refusal.request_id, refusal.assignment):
            del self._seats[refusal.request_id]
            passenger.refused(wire.error_of(refusal))

    def _passenger(self, request_id: str, assignment: int) -> Passenger | None:
        """Return the request that a report is for, unless it is another owner's by now."""
        seat = self._seats.get(request_id)
        return seat.passenger if seat and seat.passenger.assignment == assignment else None

    def _disconnected(self, reason: str) -> None:
        if self.is_connected and reason:
            _log.warning("gateway lost", gateway=str(self.member.id), reason=reason)
        self.is_connected = False
        self._prefixes.clear()
        seats, self._seats = self._seats, {}
        for seat in seats.values():
            seat.passenger.lost()
        self._on_change()


class GatewayPool:
    """The gateways of the adopted View, each with its session.

    `listeners` are called whenever a gateway connects, is lost, or changes its state.
    """

    def __init__(self, options: FrontDoorOptions) -> None:
        self.options = options
        self.listeners: set[Callable[[], None]] = set()
        self._sessions: dict[MemberId, GatewaySession] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def adopt(self, view: View) -> None:
        """Connect to new gateways and let go of those that have gone."""
        serving = {m.id: m for m in view.with_role(Role.GATEWAY) if m.serves and m.endpoint}
        for member_id in self._sessions.keys() - serving.keys():
            task = asyncio.create_task(self._sessions.pop(member_id).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for member_id, member in serving.items():
            if member_id in self._sessions:
                self._sessions[member_id].member = member
            else:
                self._sessions[member_id] = GatewaySession(member, self.options, self._note)
        self._note()

    def choose(
        self,
        excluding: Collection[MemberId] = (),
        request: Request | None = None,
        holder: str = "",
    ) -> GatewaySession | None:
        """Return the session of the gateway that a request should go to, if there is one.

        That is `holder`, NAME.INCARNATION of who has its snapshots, if it takes work.
        """
        for session in self._sessions.values():
            is_holder = str(session.member.id) == holder
            if is_holder and session.takes_work and session.member.id not in excluding:
                return session
        loads = [session.load(request) for session in self._sessions.values() if session.takes_work]
        chosen = choose_gateway(loads, excluding)
        return None if chosen is None else self._sessions[chosen]

    @property
    def is_connected(self) -> bool:
        """Whether any gateway takes work."""
        return any(session.takes_work for session in self._sessions.values())

    def stats(self) -> dict[MemberId, GatewayStats]:
        """Return the latest word of each connected gateway."""
        return {
            member_id: session.stats
            for member_id, session in self._sessions.items()
            if session.is_connected and session.stats is not None
        }

    async def close(self) -> None:
        """End all sessions."""
        sessions, self._sessions = self._sessions, {}
        await asyncio.gather(*(session.close() for session in sessions.values()), *self._closing)

    def _note(self) -> None:
        for listener in tuple(self.listeners):
            listener()
