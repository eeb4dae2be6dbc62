"""Simulated links: production buffers and frames, over a network that delays, holds and cuts.

`SimLinks` stands in for `LinkSet`: it opens links in the background and tells its user. What is on
the way when a link breaks may still arrive, as no transport promises that it does not.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from tests.chaos.lab.simulator import Simulator, Wait
from workers.dispatch.header import Header, ReplyFrame, RequestFrame
from workers.dispatch.inbox import Inbox
from workers.dispatch.link_set import OpenLink, Peer
from workers.dispatch.options import DispatchOptions, MessageShape
from workers.dispatch.recovery import AnswerTimes
from workers.errors import LinkClosedError
from workers.placement import MemberId

LAG_SHARES = (0.0, 0.0, 0.9)  # of a model's wake-ups, those that come late
LAG_S = 0.2


class Rows(NamedTuple):
    """The rows of a message, copied out of its frame."""

    values: Any
    masks: Any
    ids: Any
    weights: Any


class SimInbox(Inbox):
    """An inbox whose reader waits in virtual time."""

    def __init__(self, simulator: Simulator) -> None:
        super().__init__()
        self._simulator = simulator
        self._wait: Wait | None = None
        self._due = 0
        self._lag_share = simulator.draw.choice(LAG_SHARES)

    def put(self, arrived: Any) -> None:
        self.replies.append(arrived)
        if self._wait is not None and len(self.replies) >= self._due:
            self._wait.end()

    def tell(self) -> None:
        self.has_news = True
        if self._wait is not None:
            self._wait.end()

    def listen(self, num_replies: int, timeout_s: float) -> None:
        if self.has_news or len(self.replies) >= num_replies:
            return
        self._due = num_replies
        self._wait = Wait(self._simulator, timeout_s)
        if not self._wait.park():
            self.has_news = True
        self._wait = None
        if self._lag_share and self._simulator.draw.random() < self._lag_share:
            self._simulator.sleep(self._simulator.draw.uniform(0.0, LAG_S))


class SimLink:
    """One incarnation of a link, both ends."""

    def __init__(self, net: "Network", gateway: MemberId, worker: Any, incarnation: int) -> None:
        self.incarnation = incarnation
        self.gateway = gateway
        self.worker = worker
        self.closed = False
        self.is_reset = False  # the worker has ended, and what it sent last is lost
        self.settled: int | None = None
        self._net = net
        self._arrived: deque[tuple[Header, Rows]] = deque()
        self.deliver: Callable[[], None] = lambda: None  # set by the gateway's side

    def request_frame(self, capacity_rows: int | None = None) -> RequestFrame:
        return RequestFrame(self._net.shape, capacity_rows or self._net.capacity)

    def reply_frame(self, capacity_rows: int | None = None) -> ReplyFrame:
        return ReplyFrame(self._net.shape, capacity_rows or self._net.capacity)

    def send(self, frame: RequestFrame, header: Header) -> None:
        """Send a request to the worker."""
        if self.closed:
            raise LinkClosedError("the link is closed")
        rows = frame.rows(header.num_rows)
        copy = Rows(
            rows.values_RH[:, 0].numpy().copy(),
            rows.masks_R.copy(),
            rows.ids_RK.copy(),
            rows.weights_RK.copy(),
        )
        self._net.carry(self, lambda: self.worker.receive(self, header, copy))

    def answer(self, header: Header, values: Any, masks: Any) -> None:
        """Send a reply to the gateway; it may come after the link has closed."""

        def arrive() -> None:
            if self.is_reset or (self.closed and not self._net.brings_late_replies()):
                return
            self._arrived.append((header, Rows(values, masks, None, None)))
            self.deliver()

        self._net.carry(self, arrive)

    def receive(self, frame: ReplyFrame) -> Header:
        """Take the next message that has arrived."""
        header, rows = self._arrived.popleft()
        reply = frame.rows(header.num_rows)
        reply.values_RH[:, 0] = _tensor(rows.values)
        reply.masks_R[:] = rows.masks
        return header

    def close(self) -> None:
        self.closed = True


class Network:
    """Delays every message, holds those between pairs that are cut, and breaks links."""

    def __init__(self, simulator: Simulator, shape: MessageShape, capacity: int) -> None:
        self.simulator = simulator
        self.shape = shape
        self.capacity = capacity
        self.cut_until_s: dict[tuple[MemberId, MemberId], float] = {}
        self._last_s: dict[tuple[int, str], float] = {}

    def carry(self, link: SimLink, arrive: Callable[[], None]) -> None:
        """Bring a message over, in order within a link and direction."""
        now_s = self.simulator.now_s()
        free_s = self.cut_until_s.get((link.gateway, link.worker.member), 0.0)
        at_s = max(now_s, free_s) + self.simulator.draw.uniform(0.0001, 0.0015)
        key = (id(link), arrive.__qualname__)
        at_s = max(at_s, self._last_s.get(key, 0.0))
        self._last_s[key] = at_s
        self.simulator.after(at_s - now_s, arrive)

    def is_cut(self, gateway: MemberId, worker: MemberId) -> bool:
        return self.cut_until_s.get((gateway, worker), 0.0) > self.simulator.now_s()

    def brings_late_replies(self) -> bool:
        return self.simulator.draw.random() < 0.5


class SimLinks:
    """A gateway's links; constructed by the production dispatcher in place of a `LinkSet`."""

    def __init__(
        self,
        gateway: MemberId,
        rank: int,
        *,
        shape: MessageShape,
        options: DispatchOptions,
        host: str,
        clock: Simulator,
        user: Any,
        net: Network,
        find: Callable[[MemberId], Any],
    ) -> None:
        self.store_address = f"{host}:{rank}"
        self.peers: dict[MemberId, Peer] = {}
        self._gateway = gateway
        self._options = options
        self._simulator = clock
        self._user = user
        self._net = net
        self._find = find
        self._lately_s: dict[int, float] = {}
        self._attempts: dict[MemberId, int] = {}

    def want(self, workers: Iterable[MemberId]) -> None:
        wanted = set(workers)
        for worker in sorted(wanted - self.peers.keys()):
            times = AnswerTimes(
                factor=self._options.deadline_factor,
                least_s=self._options.min_deadline_s,
                first_s=self._options.first_deadline_s,
                lately_s=self._lately_s,
            )
            peer = Peer(worker=worker, times=times)
            self.peers = {**self.peers, worker: peer}
            self._open_soon(peer)
        for worker in sorted(self.peers.keys() - wanted):
            peer = self.peers[worker]
            self.peers = {w: p for w, p in self.peers.items() if w != worker}
            peer.dropped.set()
            if peer.open is not None:
                peer.open.close()
                self._break(peer, peer.open)

    def abandon(self, opened: OpenLink) -> None:
        peer = self.peers.get(opened.worker)
        opened.close()
        if peer is not None:
            self._user.link_down(peer, opened)
            self._open_soon(peer)

    def close(self) -> None:
        self.want(())

    def lose(self, worker: MemberId) -> None:
        """A link breaks: of itself, or because the worker's process has ended."""
        peer = self.peers.get(worker)
        if peer is not None and peer.open is not None:
            self._break(peer, peer.open)
            if not peer.dropped.is_set():
                self._open_soon(peer)

    def _break(self, peer: Peer, opened: OpenLink) -> None:
        opened.link.close()
        self._user.link_down(peer, opened)

    def _open_soon(self, peer: Peer) -> None:
        delay_s = self._simulator.draw.uniform(0.002, 0.03)
        self._simulator.after(delay_s, lambda: self._open(peer))

    def _open(self, peer: Peer) -> None:
        if peer.dropped.is_set() or peer.open is not None:
            return
        process = self._find(peer.worker)
        if (
            process is None
            or not process.takes_links_of(self._gateway)
            or self._net.is_cut(self._gateway, peer.worker)
        ):
            self._simulator.after(0.05, lambda: self._open(peer))
            return
        attempt = self._attempts[peer.worker] = self._attempts.get(peer.worker, 0) + 1
        link = SimLink(self._net, self._gateway, process, attempt)
        opened = OpenLink(peer.worker, link, self._options.num_buffers)
        peer.links_opened += 1

        def deliver() -> None:
            received = opened.receive_one()
            if received is not None:
                self._user.received(peer, opened, *received)

        link.deliver = deliver
        process.links.append(link)
        self._user.link_up(peer, opened)


def _tensor(values: Any) -> Any:
    import torch

    return torch.from_numpy(np.asarray(values, dtype=np.float32))
