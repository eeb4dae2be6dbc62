"""Where a rate is heading: a level and a slope, smoothed (Holt's linear trend).

Source: C. C. Holt, "Forecasting seasonals and trends by exponentially weighted moving averages"
(1957), with weights that follow from half-lives, since the samples come at no fixed pace.
"""

from collections.abc import Mapping

_LEVEL_HALF_LIFE = 0.25  # of how far ahead is looked: noise must not be drawn out so far
_SLOPE_HALF_LIFE = 1.0
_LEAST_AHEAD_S = 20.0  # below that, half-lives stay as they are: few requests come in a second
_MOST_GROWTH = 2.0


class Trend:
    """Follows the rate at which counters rise; whose counters come and go does not matter.

    `ahead_s` is how far ahead is looked, 0 for not at all.
    """

    def __init__(self, ahead_s: float) -> None:
        self._ahead_s = ahead_s
        self._counts: Mapping[str, int] = {}
        self._seen_s: float | None = None
        self._level: float | None = None
        self._slope = 0.0

    def note(self, counts: Mapping[str, int], now_s: float) -> None:
        """Take the counters as they stand; one that is new counts from the next time on."""
        before, before_s = self._counts, self._seen_s
        self._counts, self._seen_s = dict(counts), now_s
        if before_s is None or now_s <= before_s or not self._ahead_s:
            return
        risen = sum(max(count - before[k], 0) for k, count in counts.items() if k in before)
        self._take(risen / (now_s - before_s), now_s - before_s)

    def _take(self, rate: float, passed_s: float) -> None:
        if self._level is None:
            self._level = rate
            return
        horizon_s = max(self._ahead_s, _LEAST_AHEAD_S)
        keep = 0.5 ** (passed_s / (_LEVEL_HALF_LIFE * horizon_s))
        level = keep * (self._level + self._slope * passed_s) + (1 - keep) * rate
        keep = 0.5 ** (passed_s / (_SLOPE_HALF_LIFE * horizon_s))
        self._slope = keep * self._slope + (1 - keep) * (level - self._level) / passed_s
        self._level = max(level, 0.0)

    @property
    def growth(self) -> float:
        """By what factor the rate will have grown `ahead_s` from now: from 1, at most 2."""
        if not self._level or self._slope <= 0:
            return 1.0
        return min(1.0 + self._slope * self._ahead_s / self._level, _MOST_GROWTH)
