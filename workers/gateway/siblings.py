"""Notices a rank of a gateway that is frozen or cut off: inside a collective nobody else would.

A rank that dies breaks its connections, which every collective reports at once; this is for one
that keeps them.
"""

import threading
from collections.abc import Callable
from typing import Protocol

_TICKS = 8


class CountingStore(Protocol):
    """What is needed of a `torch.distributed` store here."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter that begins at 0, and return it."""
        ...


class Siblings:
    """Each rank counts in the group's store; rank 0 watches all of them, the others watch rank 0.

    Silence is counted in own ticks, so that a rank which was held up itself blames nobody. A rank
    is watched from its first sign of life on.
    """

    def __init__(self, store: CountingStore, rank: int, size: int, silence_s: float) -> None:
        self._store = store
        self._rank = rank
        self._watched = range(1, size) if rank == 0 else range(1)
        self._tick_s = silence_s / _TICKS
        self._counts = dict.fromkeys(self._watched, 0)
        self._quiet_ticks = dict.fromkeys(self._watched, 0)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, on_silence: Callable[[str], None]) -> None:
        """Show that this rank lives; watch in a thread, until a rank is silent or `stop`."""
        self._store.add(_key(self._rank), 1)
        self._thread = threading.Thread(
            target=self._run, args=(on_silence,), name="gateway-siblings", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Show no further sign of life. A thread that waits for a dead store is left behind."""
        self._ended.set()

    def tick(self) -> str | None:
        """Show that this rank lives, look at the others, and return what is wrong if it is."""
        try:
            self._store.add(_key(self._rank), 1)
            counts = {rank: self._store.add(_key(rank), 0) for rank in self._watched}
        except RuntimeError as error:
            return f"rank 0 of this gateway is gone: {error}"
        for rank, count in counts.items():
            is_quiet = count == self._counts[rank] and count > 0
            self._quiet_ticks[rank] = self._quiet_ticks[rank] + 1 if is_quiet else 0
            if self._quiet_ticks[rank] >= _TICKS:
                return f"rank {rank} of this gateway is silent for {_TICKS * self._tick_s:g} s"
        self._counts = counts
        return None

    def _run(self, on_silence: Callable[[str], None]) -> None:
        while not self._ended.wait(self._tick_s):
            problem = self.tick()
            if problem is not None:
                on_silence(problem)
                return


def _key(rank: int) -> str:
    return f"alive/{rank}"
