"""Snapshots on their way to the gateway that keeps them: plain connections, and threads.

A gRPC message of the same bytes takes several times the processor time of both gateways, and keeps
the interpreter from their steps meanwhile.
"""

import contextlib
import hmac
import itertools
import math
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import structlog
from google.protobuf.message import DecodeError, Message

from cluster import wire
from cluster.pb.expertmesh.v1 import gateway_pb2
from workers.clock import Clock
from workers.errors import SnapshotError
from workers.gateway.snapshot import Ended, Holder, Shard, Stamp, Verdict
from workers.gateway.snapshot_store import SnapshotStore

CHUNK_BYTES = 4 * 2**20
STALL_S = 5.0  # for a chunk, or for the next bytes of what has begun
TICK_S = 1.0
ANSWER_S = 20.0
MOST_LINES = 1024  # of ranks of other gateways, and of strangers until they are turned away
RETRY_S = 2.0  # after which a holder that was out of reach is tried again
WHOLE_S = 5.0  # how long rank 0's parts wait for those of the other ranks

_STALL_TICKS = int(STALL_S / TICK_S)
_MOST_MESSAGE_BYTES = 2**20
_MOST_HELLO_BYTES = 64
_AGAIN_S = 0.1
_SIZE = struct.Struct("<I")
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))

_log = structlog.get_logger()
_Message = TypeVar("_Message", bound=Message)


class Line:
    """One end of a connection. One thread reads; any may write.

    Every method raises OSError when the other end is gone, or stalls for `STALL_S`.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host may be gone
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.settimeout(STALL_S)
        self._connection = connection
        self._reading = connection.dup()  # with a timeout of its own
        self._reading.settimeout(TICK_S)
        self._writing = threading.Lock()

    @classmethod
    def open(cls, host: str, port: int, key: bytes) -> "Line":
        """Connect to a `SnapshotKeeper`."""
        line = cls(socket.create_connection((host, port), timeout=STALL_S))
        line.write(gateway_pb2.KeepItem(key=key))
        return line

    def write(self, message: Message, *payloads: bytes) -> None:
        """Send a message and the bytes that it announces."""
        data = message.SerializeToString()
        with self._writing:
            self._connection.sendall(_SIZE.pack(len(data)) + data)
            for payload in payloads:
                view = memoryview(payload)
                for start in range(0, len(view), CHUNK_BYTES):
                    self._connection.sendall(view[start : start + CHUNK_BYTES])

    def read(
        self, message: _Message, *, ticks: int = 1, most_bytes: int = _MOST_MESSAGE_BYTES
    ) -> _Message | None:
        """Return the message, filled; None when none has begun within so many `TICK_S`."""
        size = self._read(_SIZE.size, ticks)
        if size is None:
            return None
        (num_bytes,) = _SIZE.unpack(size)
        if num_bytes > most_bytes:
            raise ConnectionError(f"a message of {num_bytes} bytes is announced")
        try:
            message.ParseFromString(self.read_bytes(num_bytes))
        except DecodeError as error:
            raise ConnectionError(f"not a message: {error}") from error
        return message

    def read_bytes(self, num_bytes: int) -> bytes:
        """Return the next bytes."""
        data = self._read(num_bytes, _STALL_TICKS)
        if data is None:
            raise TimeoutError(f"{num_bytes} bytes do not come")
        return data

    def skip(self, num_bytes: int) -> None:
        """Leave the next bytes out."""
        for start in range(0, num_bytes, CHUNK_BYTES):
            self.read_bytes(min(CHUNK_BYTES, num_bytes - start))

    def close(self) -> None:
        """End the connection; whoever reads or writes finds out."""
        for end in (self._connection, self._reading):
            with contextlib.suppress(OSError):  # it has ended
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _read(self, num_bytes: int, ticks: int) -> bytes | None:
        """Return so many bytes; None when so many ticks pass before the first one."""
        data = bytearray(num_bytes)
        rest = memoryview(data)
        while rest:
            try:
                count = self._reading.recv_into(rest)
            except TimeoutError:
                ticks -= 1
                if ticks > 0:
                    continue
                if len(rest) == num_bytes:
                    return None
                raise
            if not count:
                raise ConnectionError("the connection has ended")
            rest = rest[count:]
            ticks = _STALL_TICKS
        return bytes(data)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A part that is stored; its answer waits for the other ranks' parts."""

    line: Line
    number: int
    stamp: Stamp
    until_s: float


class SnapshotKeeper:
    """Takes what other gateways send, a thread for each connection.

    Attributes:
        port: Where it listens.
        key: What a connection must begin with, so that strangers are turned away.
    """

    def __init__(self, store: SnapshotStore, host: str, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._lines: set[Line] = set()
        self._is_closed = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family)
        self.port: int = self._listening.getsockname()[1]
        self.key = secrets.token_bytes(16)
        threading.Thread(target=self._accept, name="snapshot-keeper", daemon=True).start()

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # it is closed already
            self._listening.shutdown(socket.SHUT_RDWR)  # closing alone wakes nobody
        self._listening.close()
        with self._lock:
            lines = tuple(self._lines)
        for line in lines:
            line.close()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listening.accept()
                self._welcome(connection)
            except (OSError, RuntimeError) as error:  # no descriptor or thread is free, say
                if not self._is_closed:
                    _log.warning("a line of snapshots is not taken", why=str(error))
                    time.sleep(_AGAIN_S)

    def _welcome(self, connection: socket.socket) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            line = Line(connection)
            undo.callback(line.close)
            with self._lock:
                if self._is_closed or len(self._lines) >= MOST_LINES:
                    raise ConnectionRefusedError(f"there are {len(self._lines)} lines already")
                self._lines.add(line)
            undo.callback(self._forget, line)
            threading.Thread(
                target=self._serve, args=(line,), name="snapshot-line", daemon=True
            ).start()
            undo.pop_all()

    def _serve(self, line: Line) -> None:
        try:
            hello = line.read(
                gateway_pb2.KeepItem(), ticks=_STALL_TICKS, most_bytes=_MOST_HELLO_BYTES
            )
            if hello is None or not hmac.compare_digest(hello.key, self.key):
                return
            while True:
                item = line.read(gateway_pb2.KeepItem())
                self._answer_overdue()
                if item is not None:
                    self._take(line, item)
        except OSError as error:
            _log.debug("a line of snapshots ends", why=str(error))
        finally:
            line.close()
            self._forget(line)

    def _forget(self, line: Line) -> None:
        with self._lock:
            self._lines.discard(line)
            self._waiting = [w for w in self._waiting if w.line is not line]

    def _take(self, line: Line, item: gateway_pb2.KeepItem) -> None:
        if item.HasField("end"):
            key = (item.end.request_id, item.end.sequence_index)
            self._store.release(key, item.end.assignment, has_ended=item.end.has_ended)
            return
        part, head = item.part, item.part.head
        num_bytes = head.kv_bytes + head.state_bytes
        if not self._store.admits(num_bytes):
            line.skip(num_bytes)
            verdict = Verdict.REFUSED
        else:
            kv, states = line.read_bytes(head.kv_bytes), line.read_bytes(head.state_bytes)
            verdict = self._keep(head, kv, states)
        if verdict is Verdict.STORED and part.wait_s:
            until_s = self._clock.now_s() + min(part.wait_s, WHOLE_S)
            with self._lock:
                self._waiting.append(_Waiting(line, part.number, wire.stamp_of(head), until_s))
        else:
            line.write(wire.verdict_message(part.number, verdict))
        self._answer_whole()

    def _keep(self, head: gateway_pb2.ShardHead, kv: bytes, states: bytes) -> Verdict:
        try:
            return self._store.put(wire.shard_of(head, kv, states))
        except SnapshotError as error:
            _log.warning("a snapshot is refused", owner=head.owner, reason=str(error))
            return Verdict.REFUSED

    def _answer_whole(self) -> None:
        self._answer(Verdict.COMPLETE, lambda waiting: self._store.is_whole(waiting.stamp))

    def _answer_overdue(self) -> None:
        now_s = self._clock.now_s()
        self._answer(Verdict.STORED, lambda waiting: now_s > waiting.until_s)

    def _answer(self, verdict: Verdict, is_due: Callable[[_Waiting], bool]) -> None:
        with self._lock:
            due = [waiting for waiting in self._waiting if is_due(waiting)]
            self._waiting = [waiting for waiting in self._waiting if waiting not in due]
        for waiting in due:
            try:
                waiting.line.write(wire.verdict_message(waiting.number, verdict))
            except OSError:
                waiting.line.close()  # half a message may have gone


@dataclass(slots=True)
class _Route:
    """A connection to one holder, and what it has not answered, each with when it must have."""

    holder: Holder
    line: Line
    unanswered: dict[int, tuple[Stamp, float]]
    is_lost: bool = False


class SnapshotSender:
    """Sends one rank's parts, and which sequences have left, from a thread of its own.

    Args:
        rank: Rank 0 hears of its parts when their snapshots are whole.
        connect: Returns a connection to a holder, its key sent; raises OSError.
        told: Hears what became of each part, in some thread; REFUSED also when its holder is out
            of reach.
    """

    def __init__(
        self,
        rank: int,
        connect: Callable[[Holder], Line],
        told: Callable[[Stamp, Holder, Verdict], None],
        clock: Clock,
    ) -> None:
        self._rank = rank
        self._connect = connect
        self._told = told
        self._clock = clock
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._routes: dict[Holder, _Route] = {}
        self._lost_s: dict[Holder, float] = {}  # when holders were found out of reach
        self._known: set[str] = set()
        self._gone: set[str] = set()  # endpoints that were known once
        self._queue: queue.SimpleQueue[tuple[Shard | Ended, Holder] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="snapshot-sender", daemon=True).start()

    def push(self, shard: Shard, holder: Holder) -> None:
        """Send a part; returns at once."""
        self._queue.put((shard, holder))

    def release(self, ended: Ended, holder: Holder) -> None:
        """Say that a sequence has left; returns at once."""
        self._queue.put((ended, holder))

    def let_go(self, endpoints: Collection[str]) -> None:
        """End the connections to all but these; who was among them before gets no new one."""
        with self._lock:
            self._gone = (self._gone | self._known).difference(endpoints)
            self._known = set(endpoints)
            routes = [r for h, r in self._routes.items() if h.endpoint not in endpoints]
            self._lost_s = {h: s for h, s in self._lost_s.items() if h.endpoint in endpoints}
        for route in routes:
            self._lose(route, "the holder has left")

    def close(self) -> None:
        """Send what is there, then end."""
        self._queue.put(None)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            item, holder = entry
            try:
                route = self._route(holder)
                is_sent = route is not None and self._send(route, item)
            except Exception as error:  # noqa: BLE001 - what comes next must not wait for ever
                _log.error("a snapshot was not sent", holder=holder.member, why=repr(error))
                is_sent = False
            if not is_sent and isinstance(item, Shard):
                self._told(item.stamp, holder, Verdict.REFUSED)
        self.let_go(())

    def _route(self, holder: Holder) -> _Route | None:
        """Return the connection to a holder, if there is one or can be."""
        with self._lock:
            route = self._routes.get(holder)
            lost_s = self._lost_s.get(holder)
            is_gone = holder.endpoint in self._gone
        if route is not None:
            return route
        if is_gone or (lost_s is not None and self._clock.now_s() - lost_s < RETRY_S):
            return None  # what waits behind it is for others
        try:
            route = _Route(holder, self._connect(holder), {})
        except OSError as error:
            _log.debug("snapshots cannot be sent", holder=holder.member, why=str(error))
            with self._lock:
                self._lost_s[holder] = self._clock.now_s()
            return None
        with self._lock:
            is_gone = holder.endpoint in self._gone  # meanwhile
            if not is_gone:
                self._routes[holder] = route
                self._lost_s.pop(holder, None)
        if is_gone:
            route.line.close()
            return None
        threading.Thread(
            target=self._listen, args=(route,), name="snapshot-answers", daemon=True
        ).start()
        return route

    def _send(self, route: _Route, item: Shard | Ended) -> bool:
        """Return whether a part was noted: it is told of then, also when it is lost."""
        try:
            if isinstance(item, Ended):
                route.line.write(gateway_pb2.KeepItem(end=wire.ended_message(item)))
                return True
            wait_s = WHOLE_S if self._rank == 0 and item.data.size > 1 else 0.0
            part = gateway_pb2.KeepPart(
                head=wire.shard_head(item), number=next(self._numbers), wait_s=wait_s
            )
            with self._lock:
                is_lost = route.is_lost
                if not is_lost:
                    route.unanswered[part.number] = (item.stamp, math.inf)
            if is_lost:
                return False
            message = gateway_pb2.KeepItem(part=part)
            route.line.write(message, item.data.kv, item.data.states)
            with self._lock:
                if part.number in route.unanswered:  # its time begins when it is sent
                    due_s = self._clock.now_s() + ANSWER_S
                    route.unanswered[part.number] = (item.stamp, due_s)
        except OSError as error:
            self._lose(route, str(error))
        return True

    def _listen(self, route: _Route) -> None:
        try:
            while not route.is_lost:
                answer = route.line.read(gateway_pb2.KeepAnswer())
                if answer is not None:
                    self._hear(route, answer)
                now_s = self._clock.now_s()
                with self._lock:
                    oldest_s = min((due for _, due in route.unanswered.values()), default=now_s)
                if oldest_s < now_s:
                    raise TimeoutError(f"no answer to a part within {ANSWER_S:g} s")
        except OSError as error:
            self._lose(route, str(error))

    def _hear(self, route: _Route, answer: gateway_pb2.KeepAnswer) -> None:
        with self._lock:
            stamp, _ = route.unanswered.pop(answer.number, (None, 0.0))
        if stamp is not None:
            self._told(stamp, route.holder, wire.verdict_of(answer))

    def _lose(self, route: _Route, reason: str) -> None:
        with self._lock:
            if route.is_lost:
                return
            route.is_lost = True
            self._routes.pop(route.holder, None)
            self._lost_s[route.holder] = self._clock.now_s()
            unanswered, route.unanswered = route.unanswered, {}
        route.line.close()
        _log.debug("snapshots cannot be sent", holder=route.holder.member, why=reason)
        for stamp, _ in unanswered.values():
            self._told(stamp, route.holder, Verdict.REFUSED)
