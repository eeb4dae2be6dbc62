"""When to place experts anew, by what is asked of them: pure.

A new target is made when the period is over or the crew has changed, and taken when it is expected
to save enough. What is loaded towards it is decided in `planner`, a few slots at a time.
"""

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from cluster.control.options import RebalanceOptions
from cluster.control.placing.placer import Target, plan_target
from cluster.control.placing.window import LoadWindow
from cluster.control.planner import Seat, Slots, Wanted
from cluster.control.status import Rebalance
from workers.dispatch.tally import LoadReport
from workers.errors import PlacementError
from workers.placement import MemberId, Placement


class Rebalancer:
    """Keeps the load of lately, and where replicas should lie for it."""

    def __init__(self, model: Placement, options: RebalanceOptions, now_s: float) -> None:
        self._model = model
        self._options = options
        self._window = LoadWindow(model.num_layers, model.num_experts, options.half_life_s)
        self._next_s = now_s + options.period_s
        self._crew: frozenset[MemberId] = frozenset()
        self._wanted: Wanted | None = None
        self._count = 0
        self.last: Rebalance | None = None

    @property
    def is_on(self) -> bool:
        """Whether placement follows load at all."""
        return self._options.period_s > 0

    @property
    def wanted(self) -> Wanted | None:
        """What each worker should hold; None while nothing is known of the load."""
        return self._wanted

    def hear(self, report: LoadReport, now_s: float) -> None:
        """Take what a gateway's rank has counted."""
        if self.is_on:
            self._window.add(report, now_s)

    def is_due(self, crew: Collection[MemberId], *, calm: bool, now_s: float) -> bool:
        """Whether it is time to `consider`: for newcomers at once.

        `calm` says that nothing lacks copies or is being loaded.
        """
        if not self.is_on:
            return False
        return (calm and now_s >= self._next_s) or not self._crew.issuperset(crew)

    def consider(
        self,
        seats: Mapping[MemberId, Seat],
        held: Mapping[MemberId, Slots],
        *,
        floor: int,
        now_s: float,
    ) -> Rebalance | None:
        """Make a new target for the workers that may hold experts; None when all stays."""
        came = frozenset(seats.keys() - self._crew)
        self._next_s = now_s + self._options.period_s
        self._crew = frozenset(seats)
        if self._window.has_seen(self._options.min_calls):
            return self._take(self._plan(seats, held, came, floor), now_s, is_due=bool(came))
        if came:
            # Newcomers take an even share; after a new beginning of the controller all stay.
            is_settled = all(held.get(w) for w in seats)
            self._wanted = {w: tuple(held[w]) for w in seats} if is_settled else None
        return None

    def _plan(
        self,
        seats: Mapping[MemberId, Seat],
        held: Mapping[MemberId, Slots],
        came: frozenset[MemberId],
        floor: int,
    ) -> Target | None:
        self._count += 1
        newly = sum(seats[w].num_slots for w in came if not held.get(w))
        try:
            return plan_target(
                self._model,
                seats,
                held,
                self._activation_LE(),
                floor=floor,
                max_moves=max(self._options.max_moves, newly),
                seed=self._count,
            )
        except PlacementError:
            return None  # the slots do not even hold one copy of everything: others say so

    def _activation_LE(self) -> NDArray[np.float64]:
        """Return the load that was seen, or one that nobody has, another one each time."""
        if not self._options.always:
            return self._window.activation_LE()
        steep_E = 1.0 / np.arange(1, self._model.num_experts + 1)
        steep_LE = np.tile(steep_E, (self._model.num_layers, 1))
        return np.random.default_rng(self._count).permuted(steep_LE, axis=1)

    def _take(self, target: Target | None, now_s: float, *, is_due: bool) -> Rebalance | None:
        if target is None or not target.num_moves:
            return None
        if target.gain < self._options.min_gain and not (is_due or self._options.always):
            return None
        self._wanted = {w: target.held_by(w) for w in target.workers}
        count = self.last.count + 1 if self.last else 1
        self.last = Rebalance(at_s=now_s, num_moves=target.num_moves, gain=target.gain, count=count)
        return self.last
