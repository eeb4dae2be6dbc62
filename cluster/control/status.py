"""How the cluster stands, as operators see it; and what stalls."""

from dataclasses import dataclass, field

from cluster.control.ports import Pulse
from cluster.control.scaling.autoscaler import PoolScale, Scaled
from cluster.control.shares import Shares
from workers.placement import Member, Role, View
from workers.types import GatewayStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """The placement that was last made by load: when, and the how manieth.

    It moves `num_moves` replicas, and the busiest workers should then compute `gain` less.
    """

    at_s: float
    num_moves: int
    gain: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStatus:
    """One member as the controller last heard of it."""

    member: Member
    phase: str
    pulses: tuple[Pulse, ...] = ()
    silent_s: float = 0.0
    shares: Shares = field(default_factory=Shares)
    suspect: bool = False
    leaving: bool = False
    outdated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """The members of one role: how many are wanted, serve, and stand by."""

    role: Role
    wanted: int
    serving: int
    standby: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The cluster at one moment. `ready` says whether a request would be served now.

    `refuses` says that the controller decides nothing, which `failure` explains, until another one
    takes its place.
    `rebalancing_s` is for how long some expert has lacked a wanted copy; 0 while none does.
    `replicas_moving` are still to be loaded for the sake of balance.
    `scales` are the numbers of members that follow load, `scaled` their latest changes, each with
    its age in seconds. `rolling` says whether outdated members, which were started with other
    settings than new ones
    are, are being replaced.
    """

    view: View
    members: tuple[MemberStatus, ...]
    ready: bool
    reasons: tuple[str, ...] = ()
    failure: str = ""
    pools: tuple[PoolStatus, ...] = ()
    controller: Member | None = None
    rebalancing_s: float = 0.0
    replicas_loading: int = 0
    replicas_moving: int = 0
    last_rebalance: Rebalance | None = None
    last_rebalance_age_s: float = 0.0
    allows_chaos: bool = False
    rolling: bool = False
    scales: tuple[PoolScale, ...] = ()
    scaled: tuple[tuple[float, Scaled], ...] = ()
    refuses: bool = False


class StepWatch:
    """Notices a gateway that has sequences to run and does not step."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._steps = -1
        self._moved_s = 0.0

    def note(self, stats: GatewayStats, now_s: float) -> None:
        """Take a gateway's latest word."""
        if stats.steps != self._steps or not (stats.running or stats.waiting):
            self._steps = stats.steps
            self._moved_s = now_s

    def stalled_s(self, now_s: float) -> float:
        """Return for how long no token has moved, once that is too long; else 0."""
        quiet_s = now_s - self._moved_s if self._steps >= 0 else 0.0
        return quiet_s if quiet_s > self._stall_s else 0.0
