"""Connections to gateways: one session with each, and the choice between them."""

import asyncio
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import grpc
import structlog

from cluster import wire
from cluster.frontdoor.balance import GatewayLoad, KeptPrompt, choose_gateway, has_room
from cluster.frontdoor.options import FrontDoorOptions
from cluster.frontdoor.pace import Pace, relative
from cluster.frontdoor.seats import Passenger, Seat
from cluster.frontdoor.silence import Silence
from cluster.ownership.directory import NUM_DIRECTORIES, directories_of
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from workers.gateway.prefix_digest import prefix_digests
from workers.placement import Member, MemberId, MemberState, Role, View
from workers.types import GatewayStats, PrefixPlace, Request, SnapshotPlace

_log = structlog.get_logger()

# A process that dies is noticed at once; one that falls silent, by the loads that it does not tell;
# one that was never heard, by keepalive.
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),  # else 60 s, whatever the keepalive says
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),
)


_FETCH_TOKENS = 1024  # computing them costs like fetching a snapshot, where nothing else is said

_NOTHING: tuple[tuple[int, ...], str, int] = ((), "", 0)  # of a prompt and a salt is cached


class Registrar(Protocol):
    """Hears what directories and owners say of the requests of this front door."""

    def superseded(self, request_id: str, assignment: int) -> None:
        """Another call has taken a request over."""
        ...

    def cancelled(self, request_id: str) -> None:
        """Somebody wants a request to end."""
        ...


class _Nobody:
    def superseded(self, request_id: str, assignment: int) -> None:
        """Nobody has it."""

    def cancelled(self, request_id: str) -> None:
        """Nobody has it."""


Answer = asyncio.Future[gateway_pb2.Claimed | None]


class GatewaySession:
    """The stream with one gateway, opened again whenever it breaks."""

    def __init__(
        self,
        member: Member,
        options: FrontDoorOptions,
        on_change: Callable[[], None],
        registrar: Callable[[], Registrar],
    ) -> None:
        self.member = member
        self.stats: GatewayStats | None = None
        self.is_connected = False
        self._options = options
        self._on_change = on_change
        self._registrar = registrar
        self._seats: dict[tuple[str, int], Seat] = {}  # by request id and assignment
        self._num_others = 0  # sequences that other front doors have there
        self._pace = Pace()
        self._questions: dict[int, Answer] = {}  # by ticket
        self._num_tickets = 0
        self._let_go: dict[str, int] = {}  # what the gateway may still hold, and must free
        self._silence = Silence(options.gateway_silence_s)
        self._prefixes: dict[int, int] = {}  # digests with their numbers of tokens
        self._counted = _NOTHING
        self._outgoing: asyncio.Queue[gateway_pb2.SessionRequest] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    @property
    def takes_work(self) -> bool:
        """Whether new requests may be sent to it."""
        return self.is_connected and self.member.state is MemberState.ACTIVE

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that are promised there and not yet delivered; those of others are guessed."""
        own = sum(seat.tokens_ahead for seat in self._seats.values())
        return own + self._num_others * self._options.expected_tokens // 2

    @property
    def cost_s(self) -> float | None:
        """What a step is expected to take there for each of its sequences, if that is known."""
        return self._pace.cost_s

    def has_room(self, num_sequences: int) -> bool:
        """Whether so many new sequences are taken at once, as far as is known."""
        known = self._num_others + self._num_own
        return self.stats is None or has_room(self.stats, known, num_sequences)

    @property
    def _num_own(self) -> int:
        return sum(seat.num_running for seat in self._seats.values())

    def submit(self, request: Request, passenger: Passenger) -> None:
        """Send a request; its events are delivered to the passenger."""
        fetched = 0 if request.prefix is None else request.prefix.num_tokens
        restored = max((place.position for place in request.snapshots), default=0)
        spared = max(fetched, restored, self.cached_tokens(request))
        seat = Seat(passenger, request, spared, self._options.expected_tokens)
        self._seats[request.request_id, request.assignment] = seat
        self.send(gateway_pb2.SessionRequest(submit=wire.submit_message(request)))

    def leave(self, passenger: Passenger, *, has_ended: bool) -> None:
        """Forget a request; the gateway frees it at once unless it has ended there."""
        seat = self._seats.pop((passenger.request_id, passenger.assignment), None)
        if seat is not None and not has_ended:
            self.let_go(passenger.request_id, passenger.assignment)

    def detach(self, passenger: Passenger) -> None:
        """Forget a request; the gateway keeps it for its window."""
        request_id, assignment = passenger.request_id, passenger.assignment
        if self._seats.pop((request_id, assignment), None) is not None:
            detach = gateway_pb2.Detach(request_id=request_id, assignment=assignment)
            self.send(gateway_pb2.SessionRequest(detach=detach))

    def let_go(self, request_id: str, assignment: int) -> None:
        """Have the gateway free what it still holds of an assignment, when it can be reached."""
        if self.is_connected:
            abort = gateway_pb2.Abort(request_id=request_id, assignment=assignment)
            self.send(gateway_pb2.SessionRequest(abort=abort))
        else:
            self._let_go[request_id] = assignment

    async def ask(
        self, question: gateway_pb2.Claim | gateway_pb2.CancelClaim
    ) -> gateway_pb2.Claimed | None:
        """Ask the directory at this gateway; None when the session breaks before its answer."""
        if not self.is_connected:
            return None
        self._num_tickets += 1
        question.ticket = ticket = self._num_tickets
        answer: Answer = asyncio.get_running_loop().create_future()
        self._questions[ticket] = answer
        if isinstance(question, gateway_pb2.Claim):
            self.send(gateway_pb2.SessionRequest(claim=question))
        else:
            self.send(gateway_pb2.SessionRequest(cancel=question))
        try:
            return await answer  # ends by the answer, or with the session, whose silence is bounded
        finally:
            self._questions.pop(ticket, None)

    def send(self, command: gateway_pb2.SessionRequest) -> None:
        """Queue a command; lost when the session breaks."""
        self._outgoing.put_nowait(command)

    async def close(self) -> None:
        """End the stream; its requests are lost to it."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def cached_tokens(self, request: Request) -> int:
        """Return the length of the longest prefix of a prompt whose state the gateway keeps."""
        prompt = request.prompt_token_ids
        if not self._is_counted(request):
            self._counted = (prompt, request.cache_salt, self._count(request))
        return self._counted[2]

    def _is_counted(self, request: Request) -> bool:
        """Whether it was the last that was asked for: a submission asks several times."""
        prompt, salt, _ = self._counted
        return prompt is request.prompt_token_ids and salt == request.cache_salt

    def _count(self, request: Request) -> int:
        prompt = request.prompt_token_ids
        lengths = sorted({n for n in self._prefixes.values() if n < len(prompt)})
        cached = (
            length
            for length, digest in prefix_digests(request.cache_salt, prompt, lengths)
            if digest in self._prefixes
        )
        return max(cached, default=0)

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(
            self.member.endpoint, options=_CHANNEL_OPTIONS
        ) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            while True:
                try:
                    await self._serve(stub)
                except Exception:  # noqa: BLE001 - such as a broken message: the next one may do
                    _log.exception("a session broke", gateway=str(self.member.id))
                await asyncio.sleep(self._options.reconnect_s)

    async def _serve(self, stub: "gateway_pb2_grpc.GatewayServiceAsyncStub") -> None:
        """Open the stream and read it until it breaks or falls silent."""
        reason = ""  # this end closes it
        self._outgoing = asyncio.Queue()
        self.send(
            gateway_pb2.SessionRequest(hello=gateway_pb2.Hello(front_door=self._options.name))
        )
        call = stub.Session()  # type: ignore[call-arg]  # commands are written, not iterated
        writer = asyncio.create_task(self._write(call))
        listener = asyncio.create_task(self._listen(call))
        try:
            async for response in call:
                self._receive(response)
            reason = "the gateway ended the stream"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:
            if self._task.cancelling():
                raise
            reason = f"silent for {self._options.gateway_silence_s:g} s"
        finally:
            listener.cancel()
            writer.cancel()
            call.cancel()
            self._disconnected(reason)

    async def _listen(
        self,
        call: grpc.aio.StreamStreamCall[gateway_pb2.SessionRequest, gateway_pb2.SessionResponse],
    ) -> None:
        """End the stream when nothing has come for too long."""
        while not self._silence.is_too_long:
            await asyncio.sleep(self._silence.tick_s)
            if self.is_connected:
                self._silence.tick()
        call.cancel()

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
        self._silence.broken()
        if not self.is_connected:
            self._connected()
        match response.WhichOneof("report"):
            case "stats":
                self._note_load(wire.stats_of(response.stats))
            case "prefixes":
                wire.update_prefixes(self._prefixes, response.prefixes)
                self._counted = _NOTHING
            case "events":
                self._deliver(response.events.events)
            case "refusal":
                self._refused(response.refusal)
            case "snapshot":
                self._placed(response.snapshot)
            case "claimed":
                self._answered(response.claimed)
            case "cancelled":
                self._registrar().cancelled(response.cancelled.request_id)
            case _:
                pass  # a kind of report that this version does not know

    def _note_load(self, stats: GatewayStats) -> None:
        self.stats = stats
        self._pace.note(stats, asyncio.get_running_loop().time())
        self._num_others = max(stats.running + stats.waiting - self._num_own, 0)

    def _deliver(self, messages: Iterable[gateway_pb2.TokenEvent]) -> None:
        for message in messages:
            seat = self._seats.get((message.request_id, message.assignment))
            if seat is not None:
                seat.deliver(wire.event_of(message))

    def _placed(self, report: gateway_pb2.SnapshotReport) -> None:
        seat = self._seats.get((report.request_id, report.assignment))
        if seat is not None:
            seat.passenger.held(wire.place_of(report.place))

    def _answered(self, claimed: gateway_pb2.Claimed) -> None:
        answer = self._questions.get(claimed.ticket)
        if answer is not None and not answer.done():
            answer.set_result(claimed)

    def _refused(self, refusal: gateway_pb2.Refusal) -> None:
        if refusal.reason == gateway_pb2.REFUSAL_REASON_SUPERSEDED:
            self._registrar().superseded(refusal.request_id, refusal.assignment)
            return
        seat = self._seats.pop((refusal.request_id, refusal.assignment), None)
        if seat is not None:
            seat.passenger.refused(wire.error_of(refusal))

    def _connected(self) -> None:
        self.is_connected = True
        _log.info("gateway connected", gateway=str(self.member.id))
        let_go, self._let_go = self._let_go, {}
        for request_id, assignment in let_go.items():
            self.let_go(request_id, assignment)
        self._on_change()

    def _disconnected(self, reason: str) -> None:
        if self.is_connected and reason:
            _log.warning("gateway lost", gateway=str(self.member.id), reason=reason)
        self.is_connected = False
        self._silence.broken()
        for answer in self._questions.values():
            if not answer.done():
                answer.set_result(None)
        self._prefixes.clear()
        self._counted = _NOTHING
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
        self.registrar: Registrar = _Nobody()
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
                self._sessions[member_id] = GatewaySession(
                    member, self.options, self._note, lambda: self.registrar
                )
        self._note()

    def choose(
        self,
        excluding: Collection[MemberId] = (),
        request: Request | None = None,
        snapshot: SnapshotPlace | None = None,
    ) -> GatewaySession | None:
        """Return the session of the gateway that a request should go to, if there is one.

        A snapshot of it draws it to its holder as a kept prefix would: until fetching is cheaper.
        """
        num_tokens = self._known_tokens(request, snapshot)
        kept = self._at_holder(snapshot, num_tokens) or self._kept(request)
        sessions = {m: session for m, session in self._sessions.items() if session.takes_work}
        costs_s = {m: session.cost_s for m, session in sessions.items()}
        known_s = [cost_s for cost_s in costs_s.values() if cost_s is not None]
        loads = [
            GatewayLoad(
                id=member_id,
                outstanding_tokens=session.outstanding_tokens,
                cached_tokens=kept.spared(member_id),
                pace=relative(costs_s[member_id], known_s),
                has_room=session.has_room(request.num_sequences if request is not None else 1),
            )
            for member_id, session in sessions.items()
        ]
        name = ""
        if request is not None:
            name = request.request_id
            completion = min(request.stopping.max_tokens, self.options.expected_tokens)
            num_tokens += request.num_sequences * completion
        chosen = choose_gateway(loads, excluding, num_tokens=num_tokens, name=name)
        return None if chosen is None else self._sessions[chosen]

    def prefix_for(self, session: GatewaySession, request: Request) -> PrefixPlace | None:
        """Return where a gateway should fetch a prompt's begin, if that is cheaper than computing.

        Not where the scores of its tokens are wanted, for which all of them are computed.
        """
        if request.output.prompt_logprobs is not None and not any(request.emitted):
            return None
        return self._kept(request).elsewhere(session.member.id)

    def find(self, gateway: str) -> GatewaySession | None:
        """Return the session of a gateway by NAME.INCARNATION, whether it is connected or not."""
        return next((s for m, s in self._sessions.items() if str(m) == gateway), None)

    def is_gone(self, gateway: MemberId) -> bool:
        """Whether a gateway that was there cannot be reached any more."""
        session = self._sessions.get(gateway)
        return session is None or not session.is_connected

    def directories(self, request_id: str) -> list[GatewaySession]:
        """Return the sessions of a request's directory and of what stands in for it."""
        connected = [m for m, session in self._sessions.items() if session.is_connected]
        ranked = directories_of(request_id, connected)
        return [self._sessions[member] for member in ranked[:NUM_DIRECTORIES]]

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

    def _known_tokens(self, request: Request | None, snapshot: SnapshotPlace | None) -> int:
        """Return how many tokens there are to go on from, of the prompt and behind it."""
        num_prompt = len(request.prompt_token_ids) if request is not None else 0
        return max(num_prompt, snapshot.position if snapshot is not None else 0)

    def _at_holder(self, snapshot: SnapshotPlace | None, num_tokens: int) -> KeptPrompt | None:
        """Return what a snapshot spares at its holder, and at the others less what it costs.

        How far it is may not be known: then it has the prompt, probably. None if it is out of
        reach.
        """
        holder = self.find(snapshot.holder) if snapshot is not None else None
        if holder is None or not holder.is_connected:
            return None
        fetch_tokens = self.options.prefix_fetch_tokens or _FETCH_TOKENS
        return KeptPrompt({holder.member.id: num_tokens}, fetch_tokens)

    def _kept(self, request: Request | None) -> KeptPrompt:
        """Return what all gateways keep of a prompt, also those that leave."""
        if request is None:
            return KeptPrompt({})
        connected = [session for session in self._sessions.values() if session.is_connected]
        connected.sort(key=lambda session: session.outstanding_tokens)
        kept = {session.member.id: session.cached_tokens(request) for session in connected}
        return KeptPrompt(kept, self.options.prefix_fetch_tokens)

    async def close(self) -> None:
        """End all sessions."""
        sessions, self._sessions = self._sessions, {}
        await asyncio.gather(*(session.close() for session in sessions.values()), *self._closing)

    def _note(self) -> None:
        for listener in tuple(self.listeners):
            listener()
