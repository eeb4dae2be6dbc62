"""The links of an expert worker, one to each gateway rank of the View, taken as they are offered.

Per gateway rank one thread follows its offers and, per open link, one receives. A newer offer
replaces the link: the gateway has then given up the one before.
"""

import logging
import threading
from collections.abc import Callable

import torch

from workers.clock import Clock
from workers.dispatch.options import MAX_LINKS, LinkTerms
from workers.dispatch.rendezvous import LinkOpener, LinkStore, link_key
from workers.errors import DispatchError, LinkClosedError
from workers.expert.served_link import Call, ServedLink
from workers.placement import Member, MemberId, Role, View

_STORE_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_JOIN_S = 3.0

GatewayRank = tuple[MemberId, int, str]  # gateway, rank, address of its store

log = logging.getLogger(__name__)


def _ranks_of(gateway: Member) -> list[GatewayRank]:
    return [(gateway.id, rank, store) for rank, store in enumerate(gateway.stores) if store]


class Followers:
    """Keeps the links that gateways offer; `deliver` gets every call, in its link's thread."""

    def __init__(
        self,
        worker: MemberId,
        *,
        opener: LinkOpener,
        refuse: Callable[[LinkTerms], str],
        deliver: Callable[[Call], None],
        on_settled: Callable[[], None],
        num_layers: int,
        clock: Clock,
    ) -> None:
        self._worker = worker
        self._opener = opener
        self._refuse = refuse
        self._deliver = deliver
        self._on_settled = on_settled
        self._num_layers = num_layers
        self._clock = clock
        self._lock = threading.Lock()
        self._order = (-1, -1)
        self._closed = False
        self._dropped: dict[GatewayRank, threading.Event] = {}
        self._attempts: dict[GatewayRank, int] = {}  # goes on when a gateway is wanted again
        self._threads: list[threading.Thread] = []
        self._served: set[ServedLink] = set()

    @property
    def num_links(self) -> int:
        """Links that are open."""
        return len(self._served)

    def adopt(self, view: View) -> None:
        """Follow the gateway ranks that may call it by a View newer than the last one.

        Those of its own cell come first where a process may not have so many links. A gateway that
        has borrowed from it is followed for as long as it lives, and ends its links itself: this
        end, which may hear of the View first, would cut off calls that have nowhere else to go yet.
        """
        with self._lock:
            if self._closed or view.order <= self._order:
                return
            self._order = view.order
            cell = view.cell_of(self._worker)
            callers = sorted(view.callers_of(self._worker), key=lambda m: (m.cell != cell, m.id))
            alive = {rank for member in view.with_role(Role.GATEWAY) for rank in _ranks_of(member)}
            known = [gateway for gateway in self._dropped if gateway in alive]
            ranks = [rank for member in callers for rank in _ranks_of(member)]
            wanted = set(list(dict.fromkeys([*ranks, *known]))[:MAX_LINKS])
            for gone in self._dropped.keys() - wanted:
                self._dropped.pop(gone).set()
            for gateway in sorted(wanted - self._dropped.keys()):
                dropped = self._dropped[gateway] = threading.Event()
                self._start(self._follow, gateway, dropped)

    def close(self) -> None:
        """Close all links and wait, within a deadline, for their threads."""
        with self._lock:
            self._closed = True
            for dropped in self._dropped.values():
                dropped.set()
            threads, self._threads = self._threads, []
        for served in list(self._served):
            served.link.close()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)

    def _start(self, body: Callable[..., None], *arguments: object) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=body, args=arguments, name="link", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _follow(self, gateway: GatewayRank, dropped: threading.Event) -> None:
        """Body of the thread of one gateway rank: connect to its store, follow, again."""
        current: ServedLink | None = None
        pause_s = _FIRST_PAUSE_S
        while not dropped.is_set():
            try:
                store = LinkStore.connect(gateway[2], _STORE_TIMEOUT_S)
                while not dropped.is_set():
                    current = self._follow_offer(gateway, store, current, dropped)
                    pause_s = _FIRST_PAUSE_S
            except LinkClosedError as error:
                log.info("gateway %s rank %d: %s", gateway[0], gateway[1], error)
                dropped.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if current is not None:
            current.link.close()

    def _follow_offer(
        self,
        gateway: GatewayRank,
        store: LinkStore,
        current: ServedLink | None,
        dropped: threading.Event,
    ) -> ServedLink | None:
        """Wait for the next offer and take it; returns the link that then holds.

        Raises LinkClosedError when the store is gone.
        """
        member, rank, _ = gateway
        key = link_key(member, rank, self._worker)
        offered = self._opener.await_offer(store, key, self._attempts.get(gateway, 0) + 1, dropped)
        if offered is None:
            return current
        attempt, terms = offered
        self._attempts[gateway] = attempt
        if current is not None:
            current.link.close()
        try:
            link = self._opener.accept(store, key, attempt, terms, self._refuse(terms))
        except DispatchError as error:
            log.warning("link %d to %s rank %d: %s", attempt, member, rank, error)
            return None
        served = ServedLink(member, rank, link, terms.num_buffers, self._on_settled)
        with self._lock:
            self._served.add(served)
            self._start(self._receive, served)
        return served

    def _receive(self, served: ServedLink) -> None:
        """Body of the thread of one link: receive calls until it ends."""
        try:
            with torch.inference_mode():  # of the thread, which may compute what it receives
                while (received := served.receive(self._num_layers)) is not None:
                    header, frame = received
                    self._deliver(Call(served, header, frame, self._clock.now_s()))
        except DispatchError as error:
            if not self._closed:
                log.warning("link to %s rank %d: %s", served.gateway, served.rank, error)
        finally:
            served.close()
            self._served.discard(served)
