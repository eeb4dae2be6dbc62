"""When the number of one role's members changes: bounds, patience and pace; pure.

More come soon and in numbers, since a request waits for them; fewer go late and slowly, since what
was let go takes long to come back.
"""

from dataclasses import dataclass

from cluster.control.options import PoolScaling
from cluster.control.scaling.policy import Appraisal

_DOWN_SHARE = 0.1  # of the members may leave at once, and one always


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From how many members to how many, and why."""

    before: int
    after: int
    why: str


class PoolScaler:
    """Turns what a load needs, seen again and again, into changes of a number."""

    def __init__(self, options: PoolScaling) -> None:
        self._options = options
        self._more_since_s: float | None = None
        self._fewer_since_s: float | None = None
        self._most_since = 0  # the most that would have been needed since fewer would do
        self._changed_s = 0.0

    def bounds(self, fewest: int) -> tuple[int, int]:
        """Return the bounds, of which the lower one is never below `fewest`."""
        low = max(self._options.min, fewest)
        return low, max(self._options.max, low)

    def decide(
        self, appraisal: Appraisal, *, wanted: int, serving: int, fewest: int, now_s: float
    ) -> Change | None:
        """Return a change that is due now, if one is.

        Args:
            appraisal: What the load needs.
            wanted: How many members are wanted now.
            serving: How many of them serve.
            fewest: The least number that could serve at all, whatever the load.
            now_s: The time.
        """
        low, high = self.bounds(fewest)
        bounded = min(max(wanted, low), high)
        if bounded != wanted:
            return self._change(wanted, bounded, f"bounds are {low} and {high}", now_s)
        enough = min(appraisal.enough, high)
        least = min(max(appraisal.least, low), high)
        if enough > wanted:
            self._fewer_since_s = None
            return self._grow(enough, appraisal.why, wanted=wanted, serving=serving, now_s=now_s)
        self._more_since_s = None
        if least < wanted:
            return self._shrink(least, appraisal.why, wanted=wanted, serving=serving, now_s=now_s)
        self._fewer_since_s = None
        return None

    def _grow(
        self, enough: int, why: str, *, wanted: int, serving: int, now_s: float
    ) -> Change | None:
        if self._more_since_s is None:
            self._more_since_s = now_s
        if now_s - self._more_since_s < self._options.up_s:
            return None
        # Never beyond twice those that serve: what they say of the load is all that is known.
        after = min(enough, 2 * max(serving, 1))
        return self._change(wanted, after, why, now_s) if after > wanted else None

    def _shrink(
        self, least: int, why: str, *, wanted: int, serving: int, now_s: float
    ) -> Change | None:
        if self._fewer_since_s is None:
            self._fewer_since_s, self._most_since = now_s, least
        self._most_since = max(self._most_since, least)
        calm_s = now_s - max(self._fewer_since_s, self._changed_s)
        if calm_s < self._options.down_s or serving < wanted:
            return None
        after = max(self._most_since, wanted - max(1, int(_DOWN_SHARE * wanted)))
        self._fewer_since_s = None
        return self._change(wanted, after, why, now_s) if after < wanted else None

    def _change(self, before: int, after: int, why: str, now_s: float) -> Change:
        self._changed_s = now_s
        self._more_since_s = None
        return Change(before=before, after=after, why=why)
