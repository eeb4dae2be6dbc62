"""From what a rank copied aside to shards on their way: packed and handed on, off the step."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from workers.gateway.capture import Captured
from workers.gateway.snapshot import Ended, Holder, Shard
from workers.model.shards import pack

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How a rank reaches the gateway that keeps its snapshots; both calls return at once.

    What came of a push is told to the worker.
    """

    push: Callable[[Shard, Holder], None]
    release: Callable[[Ended, Holder], None] = lambda _ended, _holder: None


class Outbox:
    """Packs shards in a thread of its own. Rank 0 bounds how many are under way."""

    def __init__(self, owner: str, rank: int, size: int, keeping: Keeping) -> None:
        self._owner = owner
        self._rank = rank
        self._size = size
        self._keeping = keeping
        self._queue: queue.SimpleQueue[Captured | tuple[Ended, Holder] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def take(self, captured: Captured) -> None:
        """Take what was copied aside; returns at once."""
        self._queue.put(captured)

    def release(self, ended: Ended, holder: Holder) -> None:
        """Say that a sequence has left, after all that was taken of it; returns at once."""
        self._queue.put((ended, holder))

    def close(self, timeout_s: float) -> None:
        """Hand on what is there, then end."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._hand_on(item)
            except Exception:  # noqa: BLE001 - what comes next must not wait for ever
                _log.exception("a snapshot was not packed")

    def _hand_on(self, item: Captured | tuple[Ended, Holder]) -> None:
        if isinstance(item, Captured):
            data = pack(item.shard, rank=self._rank, size=self._size, start=item.start)
            shard = Shard(stamp=item.stamp, owner=self._owner, data=data)
            self._keeping.push(shard, item.holder)
        else:
            self._keeping.release(*item)
