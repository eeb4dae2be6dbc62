"""How the two ends of a link find each other, over the TCPStore of the gateway's rank alone.

The gateway offers attempts, numbered from 1, and the worker follows; both know of each other from
the View. Per (gateway, rank, worker):

    offer/<n>    terms of attempt n            set by the gateway
    accept/<n>   "" or the reason of a refusal  set by the worker
    link/<n>/    keys of the process group

An offer stands until it is accepted, so nobody hurries and no group waits for a peer that is not
there. The number of the attempt is the incarnation of the link. Whatever waits on the store uses a
client of its own: a waiting client blocks everybody else who shares it.
"""

import threading
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from workers.clock import Clock
from workers.dispatch.gloo_link import GlooLink
from workers.dispatch.link import Link
from workers.dispatch.nccl_link import NcclLink, open_nccl_pair
from workers.dispatch.options import LinkTerms, Transport
from workers.errors import DispatchError, LinkClosedError
from workers.mesh import make_gloo_device, make_gloo_group
from workers.placement import MemberId

GATEWAY, WORKER = 0, 1
_SHORTEST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.1


class LinkStore:
    """A client's or the server's end of one gateway rank's store. Not shared between threads."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store

    @classmethod
    def serve(cls, host: str, timeout_s: float) -> "LinkStore":
        """Start the store of a gateway rank on a free port."""
        return cls(
            TCPStore(
                host,
                0,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_s),
            )
        )

    @classmethod
    def connect(cls, address: str, timeout_s: float) -> "LinkStore":
        """Connect to a gateway rank's store; raises LinkClosedError when it is not there."""
        host, _, port = address.rpartition(":")
        try:
            return cls(
                TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
            )
        except RuntimeError as error:
            raise LinkClosedError(f"no link store at {address}: {error}") from error

    @property
    def port(self) -> int:
        """Where the store listens."""
        return int(self._store.port)

    def clone(self) -> "LinkStore":
        """Return a client with a connection of its own."""
        return LinkStore(self._store.clone())  # type: ignore[attr-defined]

    def under(self, prefix: str) -> Store:
        """Return the store that a process group may use."""
        return PrefixStore(prefix, self._store)

    def set(self, key: str, value: str) -> None:
        """Set a key; raises LinkClosedError when the server is gone."""
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise LinkClosedError(f"the link store is gone: {error}") from error

    def get(self, key: str, stop: threading.Event) -> str | None:
        """Wait for a key and return it; None when `stop` is set before it appears.

        Looks again and again, since a blocking wait of the store logs each time-out as an error.
        Raises LinkClosedError when the server is gone.
        """
        pause_s = _SHORTEST_PAUSE_S
        try:
            while not self._store.check([key]):
                if stop.wait(pause_s):
                    return None
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            return str(self._store.get(key).decode())
        except RuntimeError as error:
            raise LinkClosedError(f"the link store is gone: {error}") from error


def link_key(gateway: MemberId, rank: int, worker: MemberId) -> str:
    """Return the prefix of all keys of one pair of gateway rank and worker."""
    return f"{gateway}/{rank}/{worker}"


_WITHDRAWN = ""  # what an offer becomes that the gateway no longer waits for


class LinkOpener:
    """Opens links of one process; owns the one Gloo device (an epoll thread) that they share."""

    def __init__(self, host: str, device: str, connect_timeout_s: float, clock: Clock) -> None:
        self._gloo_device = make_gloo_device(host)
        self._host = host
        self._device = torch.device(device)
        self._connect_timeout_s = connect_timeout_s
        self._clock = clock

    def offer(
        self, store: LinkStore, key: str, attempt: int, terms: LinkTerms, stop: threading.Event
    ) -> Link | None:
        """Offer an attempt, wait until the worker takes it, and open the gateway's end.

        Returns None when `stop` is set meanwhile. Raises DispatchError when the worker refuses the
        terms, LinkClosedError when the group does not come about.
        """
        store.set(f"{key}/offer/{attempt}", terms.to_json())
        answer = store.get(f"{key}/accept/{attempt}", stop)
        if answer is None:
            store.set(f"{key}/offer/{attempt}", _WITHDRAWN)
            return None
        if answer:
            raise DispatchError(f"the worker refused the link: {answer}")
        return self._open(store, f"{key}/link/{attempt}", GATEWAY, terms, attempt)

    def await_offer(
        self, store: LinkStore, key: str, attempt: int, stop: threading.Event
    ) -> tuple[int, LinkTerms] | None:
        """Wait for an attempt, or a later one, to be offered; None when `stop` is set before.

        Raises LinkClosedError when the gateway is gone.
        """
        while (offered := store.get(f"{key}/offer/{attempt}", stop)) == _WITHDRAWN:
            attempt += 1
        return None if offered is None else (attempt, LinkTerms.from_json(offered))

    def accept(
        self, store: LinkStore, key: str, attempt: int, terms: LinkTerms, refusal: str
    ) -> Link:
        """Take an offered attempt and open the worker's end, unless there is a refusal.

        Raises DispatchError when it was refused, LinkClosedError when the gateway is gone or the
        group does not come about.
        """
        store.set(f"{key}/accept/{attempt}", refusal)
        if refusal:
            raise DispatchError(f"terms of a link refused: {refusal}")
        return self._open(store, f"{key}/link/{attempt}", WORKER, terms, attempt)

    def _open(
        self, store: LinkStore, prefix: str, rank: int, terms: LinkTerms, attempt: int
    ) -> Link:
        try:
            group = make_gloo_group(
                store.under(prefix),
                rank,
                2,
                self._host,
                self._connect_timeout_s,
                device=self._gloo_device,
                num_threads=0,
            )
            gloo = GlooLink(
                group, rank, terms, incarnation=attempt, pin_memory=self._device.type == "cuda"
            )
            if terms.transport == Transport.GLOO.value:
                return gloo
            pair = open_nccl_pair(
                store.under(f"{prefix}/nccl"), rank, self._device, self._connect_timeout_s
            )
            return NcclLink(gloo, pair, rank, device=self._device, clock=self._clock)
        except RuntimeError as error:
            raise LinkClosedError(f"a link could not be opened: {error}") from error
