"""Time as a thing that is passed in, so that tests and the simulator can hold it."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic time in seconds."""

    def now_s(self) -> float:
        """Return seconds since an arbitrary, fixed point; never goes back."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Return the machine's monotonic time in seconds."""
        return time.monotonic()
