"""The autoscaler: from what members say to how many of each role are wanted.

Expert workers follow what is seen at the experts, gateways what is seen at the gateways; neither
pool's number follows from the other's.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cluster.control.lifecycle import Life
from cluster.control.options import PoolScaling, ScalingOptions
from cluster.control.scaling.policy import Appraisal, appraise_experts, appraise_gateways
from cluster.control.scaling.pool import Change, PoolScaler
from cluster.control.scaling.signals import expert_signals, gateway_signals, tokens_done
from cluster.control.scaling.trend import Trend
from workers.placement import Role

_NUM_KEPT = 16  # changes, to be shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A change that was made, and when."""

    role: Role
    at_s: float
    before: int
    after: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolScale:
    """How one role's number stands: its bounds, what its load needs now, and why."""

    role: Role
    min: int
    max: int
    enough: int = 0
    why: str = ""


class Autoscaler:
    """Says which numbers of members are to change; remembers what it has changed and why."""

    def __init__(self, options: ScalingOptions) -> None:
        self._options = options
        pools: Mapping[Role, PoolScaling] = {
            Role.EXPERT_WORKER: options.experts,
            Role.GATEWAY: options.gateways,
        }
        self._scalers = {role: PoolScaler(pool) for role, pool in pools.items() if pool.max}
        self._trend = Trend(options.ahead_s)
        self._looked_s: float | None = None
        self._appraisals: dict[Role, Appraisal] = {}
        self._changes: deque[Scaled] = deque(maxlen=_NUM_KEPT)

    @property
    def changes(self) -> tuple[Scaled, ...]:
        """The latest changes, the newest last."""
        return tuple(self._changes)

    def bounds(self, role: Role, fewest: int) -> tuple[int, int] | None:
        """Return between which numbers a role follows load; None where it does not."""
        return self._scalers[role].bounds(fewest) if role in self._scalers else None

    def pools(self, fewest: Mapping[Role, int]) -> tuple[PoolScale, ...]:
        """Return the roles whose numbers follow load, as they were seen last."""
        bounds = {
            role: scaler.bounds(fewest.get(role, 1)) for role, scaler in self._scalers.items()
        }
        return tuple(
            PoolScale(
                role=role,
                min=bounds[role][0],
                max=bounds[role][1],
                enough=self._appraisals[role].enough if role in self._appraisals else 0,
                why=self._appraisals[role].why if role in self._appraisals else "",
            )
            for role in self._scalers
        )

    def consider(
        self,
        lives: Collection[Life],
        wanted: Mapping[Role, int],
        fewest: Mapping[Role, int],
        now_s: float,
    ) -> Mapping[Role, Change]:
        """Return the numbers that are to change now.

        Args:
            lives: All members, with their last words.
            wanted: How many of each role are wanted now.
            fewest: How many of a role must be there whatever the load, where that is above 1.
            now_s: The time.
        """
        if not self._scalers or not self._is_due(now_s):
            return {}
        self._trend.note(tokens_done(lives), now_s)
        growth = self._trend.growth
        changes = {}
        for role, scaler in self._scalers.items():
            serving = self._appraise(role, lives, growth)
            if not wanted.get(role) or not serving:
                continue  # experts run in the gateways, or nobody has said anything yet
            change = scaler.decide(
                self._appraisals[role],
                wanted=wanted[role],
                serving=serving,
                fewest=fewest.get(role, 1),
                now_s=now_s,
            )
            if change is not None:
                changes[role] = change
                self._changes.append(
                    Scaled(
                        role=role,
                        at_s=now_s,
                        before=change.before,
                        after=change.after,
                        why=change.why,
                    )
                )
        return changes

    def _is_due(self, now_s: float) -> bool:
        if self._looked_s is not None and now_s - self._looked_s < self._options.period_s:
            return False
        self._looked_s = now_s
        return True

    def _appraise(self, role: Role, lives: Collection[Life], growth: float) -> int:
        """Keep what the load needs of a role; returns how many of it serve."""
        if role is Role.EXPERT_WORKER:
            experts = expert_signals(lives)
            self._appraisals[role] = appraise_experts(experts, self._options.experts, growth)
            return experts.serving
        gateways = gateway_signals(lives)
        self._appraisals[role] = appraise_gateways(gateways, self._options.gateways, growth)
        return gateways.serving
