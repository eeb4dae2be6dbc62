"""The serving workers of the newest View and what each may be given now."""

import numpy as np

from workers.dispatch.link_set import Peer
from workers.dispatch.plan import Planner, ReplicaIndex, Standing
from workers.placement import MemberId, View


class Roster:
    """Turns View, links, suspicions and STALE answers into a `Planner`, anew after each change.

    Not thread-safe: its owner holds a lock. An expert that a worker said it does not hold is not
    asked of it again for `stale_retry_s`, or until a newer View.
    """

    def __init__(self, *, rows_per_call: int, stale_retry_s: float) -> None:
        self._rows_per_call = rows_per_call
        self._stale_retry_s = stale_retry_s
        self._index: ReplicaIndex | None = None
        self._planner: Planner | None = None
        self._believed_until_s: dict[tuple[int, MemberId, int], float] = {}
        self.peers: list[Peer | None] = []  # by worker, as the planner numbers them

    @property
    def order(self) -> tuple[int, int]:
        """The order of the View; lower than any before the first."""
        return self._index.order if self._index else (-1, -1)

    def adopt(self, view: View, index: ReplicaIndex) -> bool:
        """Take a View if it is newer; whether it was."""
        if view.order <= self.order:
            return False
        self._index = index
        self._believed_until_s.clear()
        self._planner = None
        return True

    def changed(self) -> None:
        """A link, a suspicion or a draining changed: plan anew."""
        self._planner = None

    def stale(self, worker: MemberId, layer: int, experts: list[int], now_s: float) -> None:
        """Note that a worker does not hold experts that the View places there."""
        until_s = now_s + self._stale_retry_s
        for expert in experts:
            self._believed_until_s[layer, worker, expert] = until_s
        self._planner = None

    def planner(self, peers: dict[MemberId, Peer], now_s: float) -> Planner | None:
        """Return the planner of this moment; None before the first View."""
        if self._believed_until_s and min(self._believed_until_s.values()) <= now_s:
            kept = {k: until for k, until in self._believed_until_s.items() if until > now_s}
            self._believed_until_s = kept
            self._planner = None
        if self._planner is None and self._index is not None:
            self._planner = self._make(self._index, peers)
        return self._planner

    def covered(self, peers: dict[MemberId, Peer]) -> bool:
        """Whether every expert of the View has a worker with an open link."""
        if self._index is None:
            return False
        up = [peers[w].open is not None if w in peers else False for w in self._index.workers]
        return bool(self._index.holds_LWE[:, np.array(up, dtype=bool)].any(axis=1).all())

    def _make(self, index: ReplicaIndex, peers: dict[MemberId, Peer]) -> Planner:
        self.peers = [peers.get(worker) for worker in index.workers]
        standing = []
        for peer, draining in zip(self.peers, index.draining_W, strict=True):
            if peer is None or peer.open is None:
                standing.append(Standing.UNUSABLE)
            elif draining or peer.draining or peer.suspect:
                standing.append(Standing.LAST_RESORT)
            else:
                standing.append(Standing.GOOD)
        number_of = {worker: number for number, worker in enumerate(index.workers)}
        without = frozenset(
            (layer, number_of[worker], expert)
            for layer, worker, expert in self._believed_until_s
            if worker in number_of
        )
        return Planner(index, standing, rows_per_call=self._rows_per_call, without=without)
