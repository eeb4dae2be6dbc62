"""Which member is replaced next, so that all run with the newest settings: pure.

One at a time: it stays until somebody started with the newest settings serves in its place, so a
rollout to settings that do not work stops at the first.
"""

from collections.abc import Collection, Mapping

from cluster.control.lifecycle import Life, Phase
from workers.placement import MemberId, Role

# Workers first: a gateway's links need them, and a front door needs gateways.
_ORDER = (Role.EXPERT_WORKER, Role.GATEWAY, Role.FRONT_DOOR)


def outdated(lives: Collection[Life], settings: Mapping[Role, str]) -> list[Life]:
    """Return the members that were started with other settings, in the order of replacement.

    Standbys come before those that serve, then the members of one node after those of another.
    """
    old = [w for w in lives if w.member.settings != settings.get(w.role, "")]
    return sorted(old, key=lambda w: (_ORDER.index(w.role), w.enlisted, w.member.node, w.member.id))


def next_to_leave(
    lives: Collection[Life], settings: Mapping[Role, str], wanted: Mapping[Role, int]
) -> MemberId | None:
    """Return who is to be replaced now; None while somebody is leaving or coming, or when done."""
    old = [w for w in outdated(lives, settings) if not w.leaving]
    if not old or any(life.leaving for life in lives):
        return None
    for role, count in wanted.items():
        serving = [w for w in lives if w.role is role and w.phase is Phase.SERVE]
        if len(serving) < count:
            return None
    return old[0].member.id
