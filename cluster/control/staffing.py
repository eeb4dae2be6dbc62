"""Who to start, who to put to work and who to let go, so that as many serve as are wanted: pure."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice

from cluster.control.lifecycle import Life
from cluster.control.options import Desired
from cluster.control.ports import NodeNeed
from workers.errors import RefusedError
from workers.placement import MemberId, Role


@dataclass(frozen=True, slots=True)
class Orders:
    """Names of members to start, standbys that are to serve, and members to let go."""

    start: tuple[str, ...] = ()
    enlist: tuple[MemberId, ...] = ()
    dismiss: tuple[MemberId, ...] = ()


def staff(role: Role, lives: Collection[Life], wanted: int, standby: int = 0) -> Orders:
    """Compare the members of a role with how many are wanted, and `standby` more.

    Members that are leaving do not count, but keep their names. Those beyond the number leave in
    reverse order: standbys first, then the latest names.
    """
    mine = [life for life in lives if life.role is role]
    staying = sorted((w for w in mine if not w.leaving), key=_seniority)
    taken = {life.member.id.name for life in mine}
    missing = max(wanted + standby - len(staying), 0)
    names = (f"{role.value}-{i}" for i in range(len(taken) + missing))
    free = (name for name in names if name not in taken)
    enlisted = [w for w in staying if w.enlisted]
    waiting = [w for w in staying if not w.enlisted]
    vacancies = max(wanted - len(enlisted), 0)
    surplus = enlisted[wanted:] or waiting[vacancies + standby :]
    return Orders(
        start=tuple(islice(free, missing)),
        enlist=tuple(w.member.id for w in waiting[:vacancies]),
        dismiss=tuple(w.member.id for w in surplus),
    )


def check_count(
    role: Role, count: int, *, wanted: Mapping[Role, int], desired: Desired, num_experts: int
) -> None:
    """Raise RefusedError, with the reason, when so many members of a role cannot be wanted."""
    if role not in wanted:
        raise RefusedError(f"members of role {role.value} cannot be scaled")
    is_experts = role is Role.EXPERT_WORKER
    if is_experts and not wanted[role]:
        raise RefusedError(
            "experts run in the gateways' processes here: start with experts.workers above 0"
        )
    if count < 1:
        raise RefusedError(f"{count} of role {role.value}: at least 1 must stay")
    if is_experts and count * desired.num_slots < num_experts:
        raise RefusedError(
            f"{count} expert workers of {desired.num_slots} slots cannot hold the {num_experts} "
            "experts: coverage would break; start with experts.min set for so few"
        )
    if is_experts and count > desired.max_workers:
        raise RefusedError(
            f"{count} expert workers: a gateway rank has at most {desired.max_workers} links; "
            "run further workers as another cell"
        )


def fewest_workers(desired: Desired, num_experts: int) -> int:
    """Return how many workers hold the wanted copies of every expert, each on another worker."""
    if not desired.num_slots:
        return 1
    return max(math.ceil(desired.floor * num_experts / desired.num_slots), desired.floor, 1)


def need_of(role: Role, lives: Collection[Life], count: int) -> NodeNeed:
    """Return the nodes that a role's members need, `count` of which are wanted."""
    opened = [life.opened.get(process) for life in lives for process in life.processes]
    nodes = frozenset(o.node for o in opened if o is not None and o.node)
    num_unplaced = sum(o is None or not o.node for o in opened)
    return NodeNeed(role=role, count=count, nodes=nodes, num_unplaced=num_unplaced)


def _seniority(life: Life) -> tuple[bool, int, int, MemberId]:
    """Order members: who serves or is to first, then who is furthest, then by name's number."""
    number = life.member.id.name.rpartition("-")[2]
    return (
        not life.enlisted,
        -life.progress,
        int(number) if number.isdigit() else 0,
        life.member.id,
    )
