"""The one look at the machine's clock; all that decides is told the time."""

import time


def now_s() -> float:
    """Return seconds that only rise, from an unspecified start."""
    return time.monotonic()
