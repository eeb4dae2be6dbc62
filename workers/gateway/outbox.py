"""From what a rank copied aside to shards on their way: packed and handed on, off the step."""

import queue
import threading
from collections.abc import Callable

from workers.gateway.capture import Captured
from workers.gateway.snapshot import Holder, Shard
from workers.model.shards import pack

Push = Callable[[Shard, Holder], None]  # returns at once; what came of it is told to the worker


class Outbox:
    """Packs shards in a thread of its own. Rank 0 bounds how many are under way."""

    def __init__(self, owner: str, rank: int, size: int, push: Push) -> None:
        self._owner = owner
        self._rank = rank
        self._size = size
        self._push = push
        self._queue: queue.SimpleQueue[Captured | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def take(self, captured: Captured) -> None:
        """Take what was copied aside; returns at once."""
        self._queue.put(captured)

    def close(self, timeout_s: float) -> None:
        """Hand on what is there, then end."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (captured := self._queue.get()) is not None:
            data = pack(captured.shard, rank=self._rank, size=self._size, start=captured.start)
            self._push(Shard(stamp=captured.stamp, owner=self._owner, data=data), captured.holder)
