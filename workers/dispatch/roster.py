"""The serving workers of the newest View and what each may be given now."""

import numpy as np

from workers.dispatch.link_set import Peer
from workers.dispatch.plan import Planner, ReplicaIndex, Standing
from workers.placement import MemberId


class Roster:
    """Turns View, links, suspicions and STALE answers into a `Planner`, anew after each change.

    Any thread may say that something changed; one thread, the model's, plans. An expert that a
    worker said it does not hold is not asked of it for `stale_retry_s`, or until a newer View.
    """

    def __init__(self, *, rows_per_call: int, stale_retry_s: float) -> None:
        self._rows_per_call = rows_per_call
        self._stale_retry_s = stale_retry_s
        self._index: ReplicaIndex | None = None
        self._planner: Planner | None = None
        self._changed = False
        self._peers: list[Peer | None] = []  # by worker, as the planner numbers them
        self._stale_until_s: dict[tuple[int, MemberId, int], float] = {}
        self._stale_order = (-1, -1)  # of the View whose workers said so

    @property
    def order(self) -> tuple[int, int]:
        """The order of the View; lower than any before the first."""
        return self._index.order if self._index else (-1, -1)

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 before the first View."""
        return self._index.holds_LWE.shape[2] if self._index else 0

    def adopt(self, index: ReplicaIndex) -> bool:
        """Take a View if it is newer; whether it was. One thread at a time."""
        if index.order <= self.order:
            return False
        self._index = index
        self._changed = True
        return True

    def changed(self) -> None:
        """A link, a suspicion or a draining changed: plan anew."""
        self._changed = True

    def stale(self, worker: MemberId, layer: int, experts: list[int], now_s: float) -> None:
        """Note that a worker does not hold experts that the View places there."""
        for expert in experts:
            self._stale_until_s[layer, worker, expert] = now_s + self._stale_retry_s
        self._stale_order = self.order
        self._changed = True

    def planner(self, peers: dict[MemberId, Peer], now_s: float) -> Planner | None:
        """Return the planner of this moment; None before the first View."""
        if self._stale_until_s and self._stale_order != self.order:
            self._stale_until_s = {}
            self._changed = True
        elif self._stale_until_s and min(self._stale_until_s.values()) <= now_s:
            self._stale_until_s = {k: s for k, s in self._stale_until_s.items() if s > now_s}
            self._changed = True
        if self._changed and self._index is not None:
            self._changed = False  # before anything is read: what changes now is read next time
            self._planner = self._make(self._index, peers)
        return self._planner

    def peer(self, worker: int) -> Peer:
        """Return a worker of the last planner by its number."""
        peer = self._peers[worker]
        assert peer is not None
        return peer

    def load(self) -> list[int]:
        """Return how many experts each worker is computing for us."""
        links = [peer.open if peer else None for peer in self._peers]
        return [opened.num_experts if opened else 0 for opened in links]

    def covered(self, peers: dict[MemberId, Peer]) -> bool:
        """Whether every expert of the View has a worker with an open link."""
        if self._index is None:
            return False
        up = [peers[w].open is not None if w in peers else False for w in self._index.workers]
        return bool(self._index.holds_LWE[:, np.array(up, dtype=bool)].any(axis=1).all())

    def _make(self, index: ReplicaIndex, peers: dict[MemberId, Peer]) -> Planner:
        self._peers = [peers.get(worker) for worker in index.workers]
        standing = []
        for peer, draining in zip(self._peers, index.draining_W, strict=True):
            if peer is None or peer.open is None:
                standing.append(Standing.UNUSABLE)
            elif draining or peer.draining or peer.suspect:
                standing.append(Standing.LAST_RESORT)
            else:
                standing.append(Standing.GOOD)
        number_of = {worker: number for number, worker in enumerate(index.workers)}
        without = frozenset(
            (layer, number_of[worker], expert)
            for layer, worker, expert in self._stale_until_s
            if worker in number_of
        )
        return Planner(index, standing, rows_per_call=self._rows_per_call, without=without)
