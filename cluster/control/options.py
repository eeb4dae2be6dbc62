"""What is wanted of a cluster, and how patient its controller is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from workers.placement import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """How many members of each role are wanted, and how experts are spread over them.

    Gateways and expert workers are shared out among `cells`; in each, workers have `floor` copies
    of every expert, and there are at most `max_workers` and `max_gateways`.
    `standby` members more of a role are kept warm: workers without experts, gateways with their
    weights. A worker has `num_slots`, on nodes of some pools others: `least_slots` to `most_slots`.
    `settings` names, for each role, what its processes are started with now; members with
    other settings are replaced in a rollout. `fixed` are values that all members must have had from
    the beginning.
    """

    members: Mapping[Role, int]
    num_slots: int = 0
    pool_slots: Mapping[str, int] = field(default_factory=dict)
    floor: int = 1
    standby: Mapping[Role, int] = field(default_factory=dict)
    cells: int = 1
    max_workers: int = 128
    max_gateways: int = 128
    settings: Mapping[Role, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)

    @property
    def least_slots(self) -> int:
        """Slots of a worker on the smallest node."""
        return min((self.num_slots, *self.pool_slots.values()))

    @property
    def most_slots(self) -> int:
        """Slots of a worker on the largest node."""
        return max((self.num_slots, *self.pool_slots.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceOptions:
    """How placement follows load: every `period_s`, 0 for never.

    It changes when the busiest workers are expected to compute `min_gain` less, by `max_moves`
    replicas at most. Load that lies `half_life_s` back counts half; what was seen in fewer than
    `min_calls` batches of some layer says nothing. `always` places for a load that
    nobody has, another one each time, whatever it gains; for tests.
    """

    period_s: float = 0.0
    min_gain: float = 0.03
    max_moves: int = 1024
    half_life_s: float = 60.0
    min_calls: float = 64.0
    always: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolScaling:
    """How the number of one role's members follows load: between `min` and `max`, 0 for not at all.

    So many are wanted that each is `target` full. More are added when that has been needed for
    `up_s`; one in ten leaves, and one at least, when fewer have sufficed for `down_s`.
    """

    min: int = 1
    max: int = 0
    target: float = 0.6
    up_s: float = 2.0
    down_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertScaling(PoolScaling):
    """Expert workers, whose `target` is the share of time in which they compute.

    More are added, too, when a call waits for longer than `queue_s`, or when a gateway waits for
    experts for more than the share `waiting` of its steps' time while a worker is above the target.
    """

    queue_s: float = 0.25
    waiting: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayScaling(PoolScaling):
    """Gateways, whose `target` is the share of KV or state memory that sequences hold.

    More are added, too, when sequences wait for room, or steps take longer than `step_s`, if it is
    not 0.
    """

    target: float = 0.7
    step_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingOptions:
    """How the numbers of members follow load, looked at every `period_s`.

    A load that rises is met `ahead_s` before it is there, 0 for when it is there.
    """

    experts: ExpertScaling = ExpertScaling()
    gateways: GatewayScaling = GatewayScaling()
    period_s: float = 1.0
    ahead_s: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    """Pace and patience of the controller, in seconds.

    A worker that is silent for `silence_s` is suspect: what it alone holds is loaded elsewhere. One
    silent for `lost_s`, whose experts others hold, is given up. A missing copy of which another
    exists waits `restore_s` for a worker that is on its way. Not ready is who has been without
    progress for `stall_s`, or without all copies for `lacking_s`.
    """

    pulse_s: float = 0.5
    silence_s: float = 3.0
    lost_s: float = 15.0
    phase_s: float = 900.0
    restore_s: float = 20.0
    stall_s: float = 30.0
    lacking_s: float = 300.0
    backoff_s: float = 1.0
    max_failed_starts: int = 4
    allow_chaos: bool = False
    rebalance: RebalanceOptions = RebalanceOptions()
    scaling: ScalingOptions = ScalingOptions()
