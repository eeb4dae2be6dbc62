"""How members are, from what they said last and when: pure."""

from collections.abc import Collection, Mapping

from cluster.control.lifecycle import Life, Phase
from cluster.control.options import ControllerOptions, Desired
from cluster.control.ports import ProcessId
from cluster.control.status import MemberStatus, PoolStatus, StepWatch
from workers.placement import MemberId, Role


def is_suspect(life: Life, options: ControllerOptions, now_s: float) -> bool:
    """Whether a member has been silent for so long that it may be gone."""
    return life.silent_s(now_s) > options.silence_s


def is_alone(lives: Collection[Life], options: ControllerOptions, now_s: float) -> bool:
    """Whether so many are silent that it is likelier that this controller is cut off."""
    silent = sum(is_suspect(life, options, now_s) for life in lives)
    return silent > 1 and 2 * silent >= len(lives)


def pool_status(role: Role, lives: Collection[Life], wanted: int) -> PoolStatus:
    """Count the members of a role that serve and stay, and those that stand by."""
    mine = [w for w in lives if w.role is role]
    return PoolStatus(
        role=role,
        wanted=wanted,
        serving=sum(w.phase is Phase.SERVE and not w.leaving for w in mine),
        standby=sum(w.phase is Phase.STANDBY and not w.enlisted for w in mine),
    )


def member_status(
    life: Life, desired: Desired, options: ControllerOptions, now_s: float
) -> MemberStatus:
    """Return one member as it was last heard of."""
    return MemberStatus(
        member=life.member,
        phase=life.phase.value,
        pulses=tuple(life.pulses[p] for p in life.processes if p in life.pulses),
        silent_s=life.silent_s(now_s),
        shares=life.shares.latest,
        suspect=is_suspect(life, options, now_s),
        leaving=life.leaving,
        outdated=life.member.settings != desired.settings.get(life.role, ""),
    )


def unready(lives: Collection[Life], options: ControllerOptions, now_s: float) -> list[str]:
    """Name the members that should serve and do not, or are not heard."""
    reasons = []
    for life in lives:
        if life.phase is not Phase.SERVE:
            continue
        reasons += [
            f"{process} is not ready"
            for process in life.processes
            if process not in life.pulses or not life.pulses[process].ready
        ]
        if is_suspect(life, options, now_s):
            reasons.append(f"{life.member.id} is silent for {life.silent_s(now_s):.1f} s")
    if is_alone(lives, options, now_s):
        reasons.append("most members are silent: this controller may be cut off from them")
    return reasons


def stalled(
    step_watches: Mapping[MemberId, StepWatch],
    behind_s: Mapping[ProcessId, float],
    options: ControllerOptions,
    now_s: float,
) -> list[str]:
    """Name the gateways that do not step, and the processes that hold an old View."""
    reasons = []
    for member, watch in step_watches.items():
        if stalled_s := watch.stalled_s(now_s):
            reasons.append(f"{member}: no token has moved for {stalled_s:.0f} s")
    return reasons + [
        f"{process} has not adopted the newest View for {now_s - since_s:.0f} s"
        for process, since_s in behind_s.items()
        if now_s - since_s > options.stall_s
    ]
