"""How many members a load needs: pure.

Each answer names the number that would do, the number below which nobody should go, and why. What
becomes of it, and when, is decided in `cluster.control.scaling.pool`.
"""

import math
from dataclasses import dataclass

from cluster.control.options import ExpertScaling, GatewayScaling
from cluster.control.scaling.signals import ExpertSignals, GatewaySignals

_SLACK = 0.8  # a member leaves when the rest would be at this share of the target
_PRESSURE_STEP = 0.25  # of those that serve, to be added where a queue says that they are too few


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraisal:
    """What a load needs: more are added up to `enough`, and none leaves below `least`."""

    enough: int
    least: int
    why: str


def appraise_experts(signals: ExpertSignals, options: ExpertScaling, growth: float) -> Appraisal:
    """Say how many expert workers are needed if the load grows by this factor."""
    load = _Load(signals.busy * growth, signals.serving, options.target)
    busy = _percent(signals.busy, signals.serving)
    return _appraise(
        load, _pressure_of_experts(signals, options), f"workers are busy {busy}", growth
    )


def appraise_gateways(signals: GatewaySignals, options: GatewayScaling, growth: float) -> Appraisal:
    """Say how many gateways are needed if the load grows by this factor."""
    load = _Load(signals.memory * growth, signals.serving, options.target)
    full = _percent(signals.memory, signals.serving)
    return _appraise(
        load, _pressure_of_gateways(signals, options), f"sequences fill memory {full}", growth
    )


@dataclass(frozen=True, slots=True)
class _Load:
    """In members that it would fill, on so many that serve, of which each is to be so full."""

    members: float
    serving: int
    target: float


def _appraise(load: _Load, pressed: str, why: str, growth: float) -> Appraisal:
    why += f" (target {100 * load.target:.0f} %)"
    if growth > 1:
        why += f", load is growing to {100 * growth:.0f} %"
    by_load = math.ceil(load.members / load.target)
    if not pressed:
        least = math.ceil(load.members / (_SLACK * load.target))
        return Appraisal(enough=by_load, least=least, why=why)
    enough = max(by_load, load.serving + max(1, math.ceil(_PRESSURE_STEP * load.serving)))
    return Appraisal(enough=enough, least=enough, why=f"{pressed}; {why}")


def _pressure_of_experts(signals: ExpertSignals, options: ExpertScaling) -> str:
    """Say what tells that workers are too few, however busy they are; "" for nothing."""
    if signals.queue_age_s > options.queue_s:
        return f"a call waited for {1000 * signals.queue_age_s:.0f} ms"
    # A gateway also waits for links and for few, large experts: more workers would change neither.
    if signals.waiting > options.waiting and signals.busiest > options.target:
        return f"a gateway waits for experts for {100 * signals.waiting:.0f} % of its steps"
    return ""


def _pressure_of_gateways(signals: GatewaySignals, options: GatewayScaling) -> str:
    """Say what tells that gateways are too few, however full they are; "" for nothing."""
    if signals.waiting:
        return f"{signals.waiting} sequences wait for room"
    if options.step_s and signals.step_s > options.step_s:
        return f"steps take {1000 * signals.step_s:.0f} ms"
    return ""


def _percent(total: float, count: int) -> str:
    return f"{100 * total / max(count, 1):.0f} %"
