"""Which worker is told to load what at this moment: pure, from lives and the book of replicas."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from cluster.control.lifecycle import Life, Phase
from cluster.control.planner import Load, Seat, Wanted, plan_loads
from cluster.control.replicas import ReplicaBook
from workers.errors import PlacementError
from workers.placement import MemberId

_LIVE_BATCH = 16  # loads that a serving worker is given at once: urgent ones come between
_URGENT_BATCH = 64
_MOVE_BATCH = 4  # slots of a serving worker that are written at once for the sake of balance


@dataclass(frozen=True, slots=True)
class Assignment:
    """Batches to begin now, how many loads are still to come, and what cannot be placed.

    `num_moves` are loads for the sake of balance, which nobody lacks.
    """

    batches: Mapping[MemberId, list[Load]] = field(default_factory=dict)
    num_missing: int = 0
    num_moves: int = 0
    shortage: str = ""


def assign(
    book: ReplicaBook,
    crew: Collection[Life],
    *,
    floor: int,
    doubtful: Collection[MemberId],
    rescue_only: bool,
    wanted: Wanted | None = None,
) -> Assignment:
    """Plan the loads of the workers that hold experts or are to, and pick what can begin.

    A worker in STANDBY is given all of its loads at once and serves when they are done, but only
    the urgent ones where rows wait for them; one that serves gets a few at a time, and what only
    balances comes last and by single layers. `rescue_only`: somebody is still coming who will take
    a share. `wanted`: see `plan_loads`.
    """
    ready = _ready(crew)
    if not ready:
        return Assignment()
    serving = any(w.phase is Phase.SERVE for w in ready)
    seats = seats_of(crew)
    plan = partial(
        plan_loads,
        book.model,
        seats,
        book.held(),
        floor=floor,
        fixed={worker: slots for worker, slots in book.loading.items() if worker in seats},
        doubtful=doubtful,
        rescue_only=rescue_only,
        wanted=wanted,
    )
    shortage = ""
    try:
        loads = plan()
    except PlacementError as error:
        shortage = str(error)
        if not any(book.held().values()):
            return Assignment(shortage=shortage)  # from the start: no use in beginning
        loads = plan(partial=True)  # those that leave, or come, may hold the rest
    by_worker: dict[MemberId, list[Load]] = {}
    for load in loads:
        by_worker.setdefault(load.worker, []).append(load)
    batches: dict[MemberId, list[Load]] = {}
    for worker in ready:
        mine = by_worker.get(worker.member.id, [])
        urgent = [load for load in mine if load.urgent]
        if worker.phase is Phase.STANDBY:
            batches[worker.member.id] = urgent if urgent and serving else mine
        elif mine and worker.phase is Phase.SERVE and worker.member.id not in book.loading:
            needed = [load for load in mine if not load.move]
            batches[worker.member.id] = (
                urgent[:_URGENT_BATCH] or needed[:_LIVE_BATCH] or _of_one_layer(mine)[:_MOVE_BATCH]
            )
    num_moves = sum(load.move for load in loads)
    num_missing = len(loads) - num_moves + bool(shortage)
    return Assignment(batches, num_missing, num_moves, shortage)


def seats_of(crew: Collection[Life]) -> dict[MemberId, Seat]:
    """Return the workers of a crew that can take experts now."""
    return {w.member.id: Seat(w.member.num_slots, w.member.node) for w in _ready(crew)}


def _ready(crew: Collection[Life]) -> list[Life]:
    return [w for w in crew if w.is_settled and w.phase is not Phase.DRAIN]


def _of_one_layer(loads: list[Load]) -> list[Load]:
    """Return the loads of the first layer that has any."""
    return [load for load in loads if load.expert.layer == loads[0].expert.layer]
