"""The links of a gateway rank, one to each expert worker of the View, kept open in the background.

A thread per worker offers a link, proves it by one round trip, publishes it, and then receives on
it until it breaks; then it tries again, less often each time. Nobody waits for any of this: a
worker is used from the moment its link is there.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from workers.clock import Clock
from workers.dispatch.header import (
    OLDEST_VERSION,
    VERSION,
    Header,
    Kind,
    ReplyFrame,
    RequestFrame,
)
from workers.dispatch.link import Link
from workers.dispatch.options import DispatchOptions, LinkTerms, MessageShape
from workers.dispatch.recovery import AnswerTimes, Attempt
from workers.dispatch.rendezvous import LinkOpener, LinkStore, link_key
from workers.errors import DispatchError, LinkClosedError
from workers.placement import MemberId

_PING_BUFFER = 255
_BYE_BUFFER = 254
_TICK_S = 0.5
_JOIN_S = 2.0

log = logging.getLogger(__name__)


class OpenLink:
    """The gateway's side of one open link: its buffers, and what is under way on it.

    There is always a frame to receive into: at most `num_buffers` replies are on their way or
    still looked at, and there is one frame more.
    """

    def __init__(self, worker: MemberId, link: Link, num_buffers: int) -> None:
        self.worker = worker
        self.link = link
        self.incarnation = link.incarnation
        self.free_buffers = list(range(num_buffers))
        self.queue: deque[Attempt] = deque()  # awaits a free buffer
        self.num_experts = 0  # of the calls under way
        self.idle_since_s = 0.0
        self._begun: int | None = None  # the message that the worker computes alone
        self._closed_here = False
        self._experts: dict[int, int] = {}  # by message id
        self._frames: dict[int, RequestFrame] = {}
        self._settled_frames: dict[int, RequestFrame] = {}
        self._spare_frames = deque(link.reply_frame() for _ in range(num_buffers + 1))
        self._pinging = False

    def frame(self, buffer: int) -> RequestFrame:
        """Return the request frame of a buffer."""
        frame = self._frames.get(buffer)
        if frame is None:
            control = buffer >= _BYE_BUFFER
            frame = self._frames[buffer] = self.link.request_frame(0 if control else None)
        return frame

    def started(self, message_id: int, num_experts: int) -> None:
        """Count a call that is under way."""
        self._experts[message_id] = num_experts
        self.num_experts += num_experts

    def ended(self, message_id: int) -> None:
        """Count a call that was answered."""
        self.num_experts -= self._experts.pop(message_id, 0)

    @property
    def num_calls(self) -> int:
        """Calls that are under way."""
        return len(self._experts)

    def release(self, buffer: int, frame: ReplyFrame) -> None:
        """Give back the buffer of an answered call whose reply is no longer looked at."""
        self._spare_frames.append(frame)
        self.free_buffers.append(buffer)

    def ping(self, now_s: float) -> None:
        """Send a PING, unless the last one is still unanswered."""
        if not self._pinging:
            self._pinging = True
            self.idle_since_s = now_s
            self._say(Kind.PING, _PING_BUFFER)

    def receive(self) -> tuple[Header, ReplyFrame]:
        """Wait for the next reply; whoever takes the frame releases it."""
        while True:
            received = self.receive_one()
            if received is not None:
                return received

    def receive_one(self) -> tuple[Header, ReplyFrame] | None:
        """Wait for the next message; None when it was no reply but a PONG or BEGUN."""
        frame = self._spare_frames.popleft()
        header = self.link.receive(frame)
        if header.kind == Kind.PONG:
            self._pinging = False
        elif header.kind == Kind.BEGUN:
            self._begun = header.message_id
        else:
            if header.message_id == self._begun:  # in this thread: the model's may be far behind
                self._begun = None
                self._say_settled(header)
            return header, frame
        self._spare_frames.append(frame)
        return None

    def _say_settled(self, header: Header) -> None:
        frame = self._settled_frames.get(header.buffer)
        if frame is None:
            frame = self._settled_frames[header.buffer] = self.link.request_frame(0)
        with contextlib.suppress(LinkClosedError):  # its reply has come all the same
            self.link.send(frame, header._replace(kind=Kind.SETTLED, num_rows=0))

    def prove(self, now_s: float) -> None:
        """Make one round trip before the link is used for calls."""
        self.ping(now_s)
        header = self.link.receive(self._spare_frames[0])
        if header.kind != Kind.PONG:
            raise LinkClosedError(f"a new link began with a message of kind {header.kind}")
        self._pinging = False

    @property
    def ended_by(self) -> int | None:
        """The message that the worker computed, and nothing else, when it ended the link."""
        return None if self._closed_here else self._begun

    def close(self) -> None:
        """Close the link on this side's account, which tells nothing about the worker."""
        self._closed_here = True
        self.link.close()

    def say_bye(self) -> None:
        """Tell the worker that the link is closed on purpose, and close it."""
        self._closed_here = True  # first: the worker may close it before this side does
        try:
            self._say(Kind.BYE, _BYE_BUFFER)
        except LinkClosedError as error:
            log.debug("no BYE to %s: %s", self.worker, error)
        self.close()

    def _say(self, kind: Kind, buffer: int) -> None:
        self.link.send(self.frame(buffer), Header(kind, 0, self.incarnation, buffer=buffer))


@dataclass(slots=True, eq=False)
class Peer:
    """What a gateway rank knows of one expert worker, over all incarnations of its link."""

    worker: MemberId
    times: AnswerTimes
    open: OpenLink | None = None
    suspect: bool = False
    draining: bool = False
    rows: int = 0
    links_opened: int = 0
    dropped: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class LinkUser(Protocol):
    """Who uses the links; called from the threads of the links."""

    def link_up(self, peer: Peer, opened: OpenLink) -> None:
        """A link can be used from now on."""
        ...

    def link_down(self, peer: Peer, opened: OpenLink) -> None:
        """A link broke or was closed; may come more than once."""
        ...

    def received(self, peer: Peer, opened: OpenLink, header: Header, frame: ReplyFrame) -> None:
        """A reply arrived; the frame is the user's until released."""
        ...


class LinkSet:
    """Opens, proves, pings, reopens and drops the links of one gateway rank."""

    def __init__(
        self,
        gateway: MemberId,
        rank: int,
        *,
        shape: MessageShape,
        options: DispatchOptions,
        host: str,
        clock: Clock,
        user: LinkUser,
    ) -> None:
        self._gateway = gateway
        self._rank = rank
        self._options = options
        self._clock = clock
        self._user = user
        self._terms = LinkTerms(
            version=VERSION,
            transport=options.transport.value,
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            dtype=str(shape.dtype).removeprefix("torch."),
            capacity_rows=options.capacity_rows,
            num_buffers=options.num_buffers,
            link_timeout_s=options.link_timeout_s,
            payload_checksum=options.payload_checksum,
        )
        self._store = LinkStore.serve(host, options.connect_timeout_s)
        self._opener = LinkOpener(host, options.device, options.connect_timeout_s, clock)
        self.store_address = f"{host}:{self._store.port}"
        self._closed = threading.Event()
        self._pinger = threading.Thread(target=self._ping_idle, name="link-pings", daemon=True)
        self._lately_s: dict[int, float] = {}
        self._attempts: dict[MemberId, int] = {}  # goes on when a worker is wanted again
        self.peers: dict[MemberId, Peer] = {}
        self._pinger.start()

    def want(self, workers: Iterable[MemberId]) -> None:
        """Keep links to exactly these workers. Called by one thread at a time."""
        wanted = set(workers)
        for worker in sorted(wanted - self.peers.keys()):
            options = self._options
            times = AnswerTimes(
                factor=options.deadline_factor,
                least_s=options.min_deadline_s,
                first_s=options.first_deadline_s,
                lately_s=self._lately_s,
            )
            peer = Peer(worker=worker, times=times)
            self.peers = {**self.peers, worker: peer}
            peer.thread = threading.Thread(
                target=self._keep_open,
                args=(peer, self._store.clone()),
                name=f"link-{worker}",
                daemon=True,
            )
            peer.thread.start()
        for worker in self.peers.keys() - wanted:
            peer = self.peers[worker]
            self.peers = {w: p for w, p in self.peers.items() if w != worker}
            self._drop(peer)

    def abandon(self, opened: OpenLink) -> None:
        """Close a link that is of no use any more; its own thread opens the next one."""
        opened.link.close()
        peer = self.peers.get(opened.worker)
        if peer is not None:
            self._user.link_down(peer, opened)

    def close(self) -> None:
        """Close all links and wait, within a deadline, for their threads."""
        self._closed.set()
        peers = list(self.peers.values())
        self.want(())
        for peer in peers:
            if peer.thread is not None and peer.thread is not threading.current_thread():
                peer.thread.join(_JOIN_S)
        self._pinger.join(_JOIN_S)

    def _drop(self, peer: Peer) -> None:
        peer.dropped.set()
        opened = peer.open
        if opened is not None:
            opened.say_bye()
            self._user.link_down(peer, opened)

    def _keep_open(self, peer: Peer, store: LinkStore) -> None:
        """Body of a worker's thread: open, receive until it breaks, again.

        A worker that refuses is offered the version before, which is what an older one speaks.
        """
        key = link_key(self._gateway, self._rank, peer.worker)
        pause_s, version = self._options.reconnect_s, VERSION
        while not peer.dropped.is_set():
            attempt = self._attempts[peer.worker] = self._attempts.get(peer.worker, 0) + 1
            opened = None
            try:
                opened = self._open(
                    peer, store, key, attempt, replace(self._terms, version=version)
                )
                if opened is None:
                    return
                pause_s = self._options.reconnect_s
                self._receive(peer, opened)
            except DispatchError as error:
                if not peer.dropped.is_set():
                    log.warning("link %d to %s: %s", attempt, peer.worker, error)
                if opened is None and not isinstance(error, LinkClosedError):
                    version = version - 1 if version > OLDEST_VERSION else VERSION
            peer.dropped.wait(pause_s)
            pause_s = min(2 * pause_s, self._options.max_reconnect_s)

    def _open(
        self, peer: Peer, store: LinkStore, key: str, attempt: int, terms: LinkTerms
    ) -> OpenLink | None:
        link = self._opener.offer(store, key, attempt, terms, peer.dropped)
        if link is None:
            return None
        opened = OpenLink(peer.worker, link, self._options.num_buffers)
        opened.prove(self._clock.now_s())
        peer.links_opened += 1
        self._user.link_up(peer, opened)
        if peer.dropped.is_set():  # it may have been dropped before the link was there to close
            opened.close()
        return opened

    def _receive(self, peer: Peer, opened: OpenLink) -> None:
        try:
            while True:
                header, frame = opened.receive()
                self._user.received(peer, opened, header, frame)
        except DispatchError as error:
            if not isinstance(error, LinkClosedError):  # a message without sense
                opened.close()
            raise
        finally:
            opened.link.close()
            self._user.link_down(peer, opened)

    def _ping_idle(self) -> None:
        """Body of the thread that keeps idle links from looking silent."""
        idle_s = self._options.link_timeout_s / 3
        while not self._closed.wait(min(_TICK_S, idle_s)):
            now_s = self._clock.now_s()
            for peer in self.peers.values():
                opened = peer.open
                if opened is not None and now_s - opened.idle_since_s > idle_s:
                    self._ping(peer, opened, now_s)

    def _ping(self, peer: Peer, opened: OpenLink, now_s: float) -> None:
        try:
            opened.ping(now_s)
        except LinkClosedError as error:
            log.warning("link to %s: %s", peer.worker, error)
            self._user.link_down(peer, opened)
