"""What the members of a role say of their load, in a few numbers: pure."""

from collections.abc import Collection
from dataclasses import dataclass

from cluster.control.lifecycle import Life, Phase
from workers.placement import Role
from workers.types import GatewayStats


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSignals:
    """The expert workers' load, and what gateways suffer from it.

    `busy` is the sum over the `serving` workers of the share of time in which each computed, so it
    is how many of them would be busy all the time; `busiest` is the largest of these shares.
    `queue_age_s` is the longest wait of a call lately, `waiting` the largest share of its steps'
    time in which a gateway waited for experts.
    """

    serving: int = 0
    busy: float = 0.0
    busiest: float = 0.0
    queue_age_s: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySignals:
    """The gateways' load.

    `memory` is the sum over the `serving` gateways of the share of their KV or state blocks, of
    whichever more is used, that running sequences hold. `waiting` counts the sequences for which
    some gateway has no room, and `step_s` is the time that the slowest gateway's steps take.
    """

    serving: int = 0
    memory: float = 0.0
    waiting: int = 0
    step_s: float = 0.0


def expert_signals(lives: Collection[Life]) -> ExpertSignals:
    """Read the expert workers' load from what all members said last."""
    shares = [life.shares.latest for life in _serving(lives, Role.EXPERT_WORKER)]
    waits = [life.shares.latest.waiting for life in _serving(lives, Role.GATEWAY)]
    return ExpertSignals(
        serving=len(shares),
        busy=sum(s.busy for s in shares),
        busiest=max((s.busy for s in shares), default=0.0),
        queue_age_s=max((s.queue_age_s for s in shares), default=0.0),
        waiting=max(waits, default=0.0),
    )


def gateway_signals(lives: Collection[Life]) -> GatewaySignals:
    """Read the gateways' load from what they said last."""
    gateways = _serving(lives, Role.GATEWAY)
    stats = [s for life in gateways for s in _gateway_stats(life)]
    return GatewaySignals(
        serving=len(gateways),
        memory=sum(_memory(s) for s in stats),
        waiting=sum(s.waiting for s in stats),
        step_s=max((life.shares.latest.step_s for life in gateways), default=0.0),
    )


def tokens_done(lives: Collection[Life]) -> dict[str, int]:
    """Return for each serving gateway the tokens that it has computed, prompts' and new ones."""
    return {
        str(life.member.id): stats.tokens_generated + stats.tokens_prefilled
        for life in _serving(lives, Role.GATEWAY)
        for stats in _gateway_stats(life)
    }


def _serving(lives: Collection[Life], role: Role) -> list[Life]:
    return [w for w in lives if w.role is role and w.phase is Phase.SERVE and not w.leaving]


def _gateway_stats(life: Life) -> list[GatewayStats]:
    """Return what a gateway's first rank said last; the others' words repeat it."""
    pulse = life.pulses.get(life.processes[0])
    stats = pulse.stats if pulse else None
    return [stats] if isinstance(stats, GatewayStats) else []


def _memory(stats: GatewayStats) -> float:
    states = stats.state_blocks_used / max(stats.state_blocks_total, 1)
    kv = stats.kv_blocks_used / max(stats.kv_blocks_total, 1)
    return max(states, kv)
