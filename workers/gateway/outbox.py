"""From what a rank copied aside to shards on their way: packed and handed on, off the step."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from workers.gateway.capture import Captured, Release
from workers.gateway.snapshot import Ended, Holder, Shard, Stamp
from workers.model.shards import pack

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How a rank reaches the gateway that keeps its snapshots; all calls return at once.

    What came of a push is told to the worker; `failed` is told of what could not be packed.
    """

    push: Callable[[Shard, Holder], None]
    release: Callable[[Ended, Holder], None] = lambda _ended, _holder: None
    failed: Callable[[Stamp, Holder], None] = lambda _stamp, _holder: None


class Outbox:
    """Packs shards in a thread of its own. Rank 0 bounds how many are under way."""

    def __init__(self, owner: str, rank: int, size: int, keeping: Keeping) -> None:
        self._owner = owner
        self._rank = rank
        self._size = size
        self._keeping = keeping
        self._queue: queue.SimpleQueue[Captured | Release | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def take(self, item: Captured | Release) -> None:
        """Take what was copied aside, or the word that a sequence has left; returns at once."""
        self._queue.put(item)

    def close(self, timeout_s: float) -> None:
        """Hand on what is there, then end."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Captured):
                self._push(item)
            else:
                self._keeping.release(item.ended, item.holder)

    def _push(self, captured: Captured) -> None:
        try:
            data = pack(captured.shard, rank=self._rank, size=self._size, start=captured.start)
        except Exception:  # noqa: BLE001 - such as no memory; what comes next must not wait for ever
            _log.exception("a snapshot of request %s was not packed", captured.stamp.request_id)
            self._keeping.failed(captured.stamp, captured.holder)
            return
        shard = Shard(stamp=captured.stamp, owner=self._owner, data=data)
        self._keeping.push(shard, captured.holder)
