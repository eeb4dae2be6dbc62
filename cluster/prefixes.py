"""Prefixes of prompts on their way from the gateway that keeps them to one that is less busy.

They travel like snapshots, to where the receiver takes those, so no other path has to be kept safe
from what is slow, half sent or strange.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Protocol
from weakref import WeakValueDictionary

import structlog

from cluster.snapshots import SnapshotClient
from workers.clock import Clock
from workers.gateway.prefix_digest import prefix_digest
from workers.gateway.snapshot import Holder, Snapshot, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.types import Request

MOST_SENDS = 4  # at once: each is copied aside whole, and the gateway's own snapshots wait behind
AWAY_S = 10.0  # for which a gateway that was out of reach is not asked again

_log = structlog.get_logger()


class PrefixGateway(Protocol):
    """What is needed of a `GatewayWorker` here."""

    def keeps_prefix(self, digest: int) -> bool:
        """Whether the state of a prefix is kept here."""
        ...

    def send_prefix(
        self, digest: int, name: str, receiver: Holder, most_bytes: int
    ) -> "Future[bool]":
        """Send a kept prefix as a snapshot of a request of this name; says whether it is kept."""
        ...


class PrefixSender:
    """Sends what this gateway keeps to others that ask. What is not marked runs on one loop."""

    def __init__(self, worker: PrefixGateway) -> None:
        self._worker = worker
        # By name, until the bytes are gone, also where nobody waits for them any more.
        self._verdicts: dict[str, asyncio.Future[Verdict]] = {}

    async def send(self, digest: int, name: str, receiver: Holder, most_bytes: int) -> bool:
        """Return whether a prefix is whole at its receiver."""
        if len(self._verdicts) >= MOST_SENDS or name in self._verdicts:
            return False
        loop = asyncio.get_running_loop()
        verdict = self._verdicts[name] = loop.create_future()
        verdict.add_done_callback(lambda _: self._verdicts.pop(name))

        def heard(is_kept: "Future[bool]") -> None:
            """Go on waiting if it is on its way. In the engine's thread."""
            if is_kept.cancelled() or not is_kept.result():
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self.told, name, Verdict.REFUSED)

        asked = self._worker.send_prefix(digest, name, receiver, most_bytes)
        asked.add_done_callback(heard)
        try:
            return await asyncio.shield(verdict) is Verdict.COMPLETE
        finally:
            asked.cancel()  # unless it has been answered

    def sends(self, name: str) -> bool:
        """Whether a snapshot is one of these. From any thread."""
        return name in self._verdicts

    def told(self, name: str, verdict: Verdict) -> None:
        """Hear what became of rank 0's part, which waits for those of the others."""
        sent = self._verdicts.get(name)
        if sent is not None and not sent.done():
            sent.set_result(verdict)


class PrefixSource:
    """Fetches prefixes from other gateways. All methods run on one loop.

    Requests that want the same one share it, also while they wait for their turn. All that are
    there have room in the store together, and drive nothing out of it.
    """

    def __init__(
        self,
        me: str,
        worker: PrefixGateway,
        store: SnapshotStore,
        client: SnapshotClient,
        clock: Clock,
    ) -> None:
        self._me = me
        self._worker = worker
        self._store = store
        self._client = client
        self._clock = clock
        self._fetching: dict[tuple[str, int], asyncio.Task[Snapshot | None]] = {}
        self._found: WeakValueDictionary[int, Snapshot] = WeakValueDictionary()  # by digest
        self._away_until_s: dict[str, float] = {}  # holders

    async def find(self, request: Request, endpoints: Mapping[str, str]) -> Snapshot | None:
        """Return the prefix that a request names, as a snapshot; None when it is out of reach."""
        place = request.prefix
        if place is None:
            return None
        prompt = request.prompt_token_ids[: place.num_tokens]
        digest = prefix_digest(request.cache_salt, prompt)
        if self._worker.keeps_prefix(digest):
            return None
        found = self._found.get(digest)
        if found is not None:
            return found
        key = (place.holder, digest)
        if key not in self._fetching:
            if place.holder not in endpoints or self._is_away(place.holder):
                return None
            holder = Holder(place.holder, endpoints[place.holder])
            task = asyncio.create_task(self._fetch(holder, digest, len(prompt)))
            self._fetching[key] = task
            task.add_done_callback(lambda _: self._fetching.pop(key))
        return await asyncio.shield(self._fetching[key])

    def _is_away(self, holder: str) -> bool:
        now_s = self._clock.now_s()
        self._away_until_s = {h: s for h, s in self._away_until_s.items() if s > now_s}
        return holder in self._away_until_s

    async def _fetch(self, holder: Holder, digest: int, num_tokens: int) -> Snapshot | None:
        name = f"prefix-{secrets.token_hex(16)}"  # whoever guesses it could send something else
        used_bytes = self._store.num_bytes + sum(s.num_bytes for s in self._found.values())
        most_bytes = max(0, self._store.budget_bytes - used_bytes)
        try:
            if not await self._client.send_prefix(holder, digest, name, self._me, most_bytes):
                return None
        except OSError as error:
            self._away_until_s[holder.member] = self._clock.now_s() + AWAY_S
            _log.warning("prefixes are out of reach", why=str(error))
            return None
        snapshot = self._store.newest(name, 0, num_tokens + 1)
        self._store.release((name, 0), 1, has_ended=True)
        if snapshot is not None:
            self._found[digest] = snapshot
        return snapshot
