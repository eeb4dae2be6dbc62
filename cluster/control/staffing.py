"""Who to start, who to put to work and who to let go, so that as many serve as are wanted: pure."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from cluster.control.lifecycle import Life, Phase
from cluster.control.options import Desired
from cluster.control.ports import NodeNeed
from workers.errors import RefusedError
from workers.placement import MemberId, Role


@dataclass(frozen=True, slots=True)
class Orders:
    """Names of members to start, standbys that are to serve in a cell, and members to let go."""

    start: tuple[str, ...] = ()
    enlist: tuple[tuple[MemberId, int], ...] = ()
    dismiss: tuple[MemberId, ...] = ()


def shares_of(count: int, sizes: Sequence[int]) -> list[int]:
    """Return how many of `count` members each cell is to have, by how many it has now.

    As many each, and one more in the largest ones, so that nobody moves who need not.
    """
    cells = len(sizes)
    largest = sorted(range(cells), key=lambda cell: (-sizes[cell], cell))
    return [count // cells + (cell in largest[: count % cells]) for cell in range(cells)]


def staff(
    role: Role, lives: Collection[Life], wanted: int, standby: int = 0, cells: int = 1
) -> Orders:
    """Compare the members of a role with how many are wanted in each cell, and `standby` more.

    Members that are leaving do not count, but keep their names. Those beyond a cell's number leave,
    the latest names first, once no other cell lacks any; then standbys, which are of no cell.
    """
    mine = [life for life in lives if life.role is role]
    staying = sorted((w for w in mine if not w.leaving), key=_seniority)
    taken = {life.member.id.name for life in mine}
    waiting = [w for w in staying if not w.enlisted]
    enlisted = [
        [w for w in staying if w.enlisted and w.member.cell == cell] for cell in range(cells)
    ]
    vacancies: list[tuple[int, int]] = []  # how many the cell has by then, and the cell
    surplus: list[Life] = []
    lacks = False
    shares = shares_of(wanted, [len(here) for here in enlisted])
    for cell, (here, share) in enumerate(zip(enlisted, shares, strict=True)):
        vacancies += [(count, cell) for count in range(len(here), share)]
        surplus += here[share:]
        serving = sum(w.phase is Phase.SERVE for w in here)
        lacks = lacks or (len(here) <= share and serving < share)
    if lacks:
        surplus = []  # until those serve for whom they are too many
    missing = max(len(vacancies) + standby - len(waiting), 0)
    names = (f"{role.value}-{i}" for i in range(len(taken) + missing))
    free = (name for name in names if name not in taken)
    called = zip(waiting, sorted(vacancies), strict=False)
    return Orders(
        start=tuple(islice(free, missing)),
        enlist=tuple((w.member.id, cell) for w, (_, cell) in called),
        dismiss=tuple(w.member.id for w in surplus or waiting[len(vacancies) + standby :]),
    )


def slots_left(
    lives: Collection[Life], count: int, desired: Desired, *, without: MemberId | None = None
) -> int:
    """Return the slots of the `count` expert workers that will be there; new ones get the least."""
    staying = sorted(
        (
            life
            for life in lives
            if life.role is Role.EXPERT_WORKER
            and life.enlisted
            and not life.leaving
            and life.member.id != without
        ),
        key=_seniority,
    )[:count]
    there = sum(life.member.num_slots for life in staying)
    return there + (count - len(staying)) * desired.least_slots


def enough_workers(lives: Collection[Life], wanted: int, desired: Desired, num_experts: int) -> int:
    """Return how many expert workers are to serve: more than wanted where those lack slots.

    So it is after a change of the configuration to fewer workers with more slots each, until those
    that are there have been replaced.
    """
    count = wanted
    if wanted and desired.least_slots:
        while slots_left(lives, count, desired) // desired.cells < num_experts:
            count += 1
    return count


def check_count(
    role: Role,
    count: int,
    *,
    wanted: Mapping[Role, int],
    desired: Desired,
    num_experts: int,
    num_slots: int,
) -> None:
    """Raise RefusedError, with the reason, when so many members of a role cannot be wanted.

    `num_slots` is how many slots so many expert workers would have together.
    """
    if role not in wanted:
        raise RefusedError(f"{role.plural} cannot be scaled")
    is_experts = role is Role.EXPERT_WORKER
    if is_experts and not wanted[role]:
        raise RefusedError(
            "experts run in the gateways' processes here: start with experts.workers above 0"
        )
    cells = desired.cells if role is not Role.FRONT_DOOR else 1
    each = "" if cells == 1 else f" in each of {cells} cells"
    fewest, most = count // cells, math.ceil(count / cells)
    rises = count > wanted[role]
    if fewest < 1:
        raise RefusedError(f"{count} {role.plural}: at least 1 must stay{each}")
    room = min(num_slots // cells, fewest * desired.most_slots)
    if is_experts and room < num_experts:
        raise RefusedError(
            f"{fewest} expert workers with {room} slots together{each} cannot hold the "
            f"{num_experts} experts: coverage would break; start with experts.min set for so few"
        )
    if is_experts and rises and most > desired.max_workers:
        raise RefusedError(
            f"{most} expert workers{each}: a gateway rank has at most {desired.max_workers} links; "
            "a cluster with more cells (control.cells) takes more"
        )
    has_links = role is Role.GATEWAY and wanted.get(Role.EXPERT_WORKER)
    if has_links and rises and most > desired.max_gateways:
        raise RefusedError(
            f"{most} gateways{each}: an expert worker has links to {desired.max_gateways} at most; "
            "a cluster with more cells (control.cells) takes more"
        )


def fewest_workers(desired: Desired, num_experts: int) -> int:
    """Return how many workers hold the wanted copies of every expert, each on another worker."""
    if not desired.num_slots:
        return desired.cells
    a_cell = max(math.ceil(desired.floor * num_experts / desired.least_slots), desired.floor, 1)
    return desired.cells * a_cell


def need_of(role: Role, lives: Collection[Life], count: int) -> NodeNeed:
    """Return the nodes that a role's members need, `count` of which are wanted.

    Those that leave need theirs until they have gone: a successor may have to come first.
    """
    count += sum(life.leaving for life in lives)
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
