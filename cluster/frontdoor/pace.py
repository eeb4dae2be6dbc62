"""How fast a gateway steps, from what it says of its steps. Pure."""

from statistics import median
from typing import Final

from workers.types import GatewayStats

_NEW: Final = 0.3  # the weight of the newest report
_FORGOTTEN_S: Final = 10.0  # without a step, after which the pace before says nothing
_FIXED_SEQUENCES: Final = 8  # a step without sequences costs as much as so many of them
_SPREAD: Final = 4.0  # by which paces count at most, up and down: they are estimates


class Pace:
    """Follows the step time of one gateway from one report to the next."""

    def __init__(self) -> None:
        self._before: GatewayStats | None = None
        self._step_s: float | None = None
        self._stepped_s = 0.0
        self._heard_s = 0.0

    def note(self, stats: GatewayStats, now_s: float) -> None:
        """Take a report."""
        before, self._before = self._before, stats
        self._heard_s = now_s
        steps = stats.steps - before.steps if before is not None else 0
        if before is None or steps < 0:  # its first word, or it is another process
            self._step_s, self._stepped_s = None, now_s
        elif steps > 0:
            step_s = (stats.step_s - before.step_s) / steps
            known_s = step_s if self._step_s is None else self._step_s
            self._step_s, self._stepped_s = known_s + _NEW * (step_s - known_s), now_s
        elif not before.running:
            self._begins_or_idles(stats, now_s)

    @property
    def cost_s(self) -> float | None:
        """The expected step time for each sequence of a step; None if it is not known.

        A step that was under way for longer than that, by the last report, counts by how long.
        """
        num_sequences = self._before.running if self._before is not None else 0
        under_way_s = self._heard_s - self._stepped_s if num_sequences else 0.0
        if self._step_s is None:
            return None
        return max(self._step_s, under_way_s) / (_FIXED_SEQUENCES + num_sequences)

    def _begins_or_idles(self, stats: GatewayStats, now_s: float) -> None:
        if now_s - self._stepped_s > _FORGOTTEN_S:
            self._step_s = None
        if stats.running:
            self._stepped_s = now_s


def relative(cost_s: float | None, all_costs_s: list[float]) -> float:
    """Return how many times slower than usual a gateway is; 1 where nothing is known."""
    usual_s = median(all_costs_s) if all_costs_s else 0.0
    if cost_s is None or usual_s <= 0:
        return 1.0
    return min(max(cost_s / usual_s, 1 / _SPREAD), _SPREAD)
