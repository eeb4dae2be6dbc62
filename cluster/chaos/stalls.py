"""How long clients waited because of a fault: pure, over what they saw.

The stall of a sequence at a fault is its longest gap between messages that overlaps the fault's
window, less its own median gap. The same is measured in windows of the same lengths where nothing
was done, since gaps vary by themselves.
"""

import bisect
import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.chaos.history import Answer

NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Window:
    """A fault from when it was done to when its effects have ended."""

    kind: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Stalls:
    """The stalls of one kind in seconds, sorted: of each sequence, and the worst of each fault."""

    kind: str
    sequences_s: tuple[float, ...]
    worst_s: tuple[float, ...]


def stalls_by_kind(answers: Sequence[Answer], windows: Sequence[Window]) -> list[Stalls]:
    """Return the stalls of every kind of fault, and those where nothing was done."""
    tracks = [
        (times, statistics.median(_gaps(times)))
        for answer in answers
        for sequence in range(answer.ask.num_sequences)
        if len(times := answer.times_s(sequence)) > 2
    ]
    quiet = list(_quiet_windows(windows))
    by_kind: dict[str, list[Window]] = {NOTHING: quiet} if quiet else {}
    for window in windows:
        by_kind.setdefault(window.kind, []).append(window)
    found = []
    for kind, mine in by_kind.items():
        every: list[float] = []
        worst: list[float] = []
        for window in mine:
            stalls = [
                max(longest - normal, 0.0)
                for times, normal in tracks
                if (longest := _longest_gap(times, window)) is not None
            ]
            every += stalls
            if stalls:
                worst.append(max(stalls))
        found.append(Stalls(kind, tuple(sorted(every)), tuple(sorted(worst))))
    return found


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of sorted values by nearest rank; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[max(0, -int(-percent * len(ordered) // 100) - 1)]


def _quiet_windows(windows: Sequence[Window]) -> Iterable[Window]:
    """Cut what lies between faults into windows as long as the median fault's."""
    if not windows:
        return
    length_s = statistics.median(w.end_s - w.start_s for w in windows)
    ordered = sorted(windows, key=lambda w: w.start_s)
    busy_until_s = ordered[0].end_s
    for window in ordered[1:]:
        start_s = busy_until_s
        while start_s + length_s <= window.start_s:
            yield Window(NOTHING, start_s, start_s + length_s)
            start_s += length_s
        busy_until_s = max(busy_until_s, window.end_s)


def _gaps(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def _longest_gap(times: Sequence[float], window: Window) -> float | None:
    """Return the longest gap that overlaps a window; None for a sequence that did not run then."""
    first = max(bisect.bisect_right(times, window.start_s) - 1, 0)
    last = min(bisect.bisect_left(times, window.end_s), len(times) - 1)
    if last <= first or times[-1] <= window.start_s or times[0] >= window.end_s:
        return None
    return max(_gaps(times[first : last + 1]))
