"""Which worker should load which expert next: pure, from what is loaded to what is missing.

Nothing moves that need not. First come experts without a copy, then missing copies up to the floor,
then what is wanted where (see `placer`) or, where nobody has said, an even share for workers that
hold less than theirs. A replica beyond the floor stays where it is until its slot is needed, and a
slot is taken only while enough other copies are loaded: every move is a load first and a removal
later.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from workers.errors import PlacementError
from workers.placement import ExpertId, MemberId, Placement, Replica

Slots = Mapping[ExpertId, int]
Wanted = Mapping[MemberId, Collection[ExpertId]]


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker that may hold experts: how many, and on which node it runs."""

    num_slots: int
    node: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """One expert that one worker should load into one slot; urgent if nobody else holds it.

    A `move` is beyond the floor: it can wait.
    """

    worker: MemberId
    expert: ExpertId
    slot: int
    urgent: bool = False
    move: bool = False


def plan_loads(
    model: Placement,
    seats: Mapping[MemberId, Seat],
    held: Mapping[MemberId, Slots],
    *,
    floor: int,
    fixed: Mapping[MemberId, Slots] | None = None,
    doubtful: Collection[MemberId] = (),
    rescue_only: bool = False,
    wanted: Wanted | None = None,
    partial: bool = False,
) -> list[Load]:
    """Return what to load, most urgent first; nothing when all is as it should be.

    Copies go to the worker, on a node of its own where there is one, that holds fewest experts of
    the layer, then fewest in all. Floors that the slots do not allow are met as far as they do.

    Args:
        model: Names the model's layers and experts; its replicas are not looked at.
        seats: The workers that may hold experts. What others hold does not count.
        held: What each worker holds, or will when the loads under way have ended.
        floor: Copies wanted of each expert; the number of workers bounds it.
        fixed: Those of `held` that are under way: their slots cannot be taken.
        doubtful: Workers whose copies do not count as coverage, but do as copies.
        rescue_only: Look after experts without a copy, and leave the rest as it is.
        wanted: What each worker should hold once all is done; an even share when None.
        partial: Look after as many experts as there is room for, and after nothing else.

    Raises:
        PlacementError: The slots do not suffice for one copy of every expert; not if `partial`.
    """
    board = _Board(model, seats, held, fixed=fixed or {}, doubtful=doubtful, wanted=wanted or {})
    for expert in board.experts():
        if board.num_sound(expert) or board.add(expert, least_copies=1, urgent=True):
            continue
        if not fixed and not partial:  # else what is under way may leave a slot free
            raise PlacementError(
                f"{sum(s.num_slots for s in seats.values())} slots on {len(seats)} expert workers "
                f"cannot hold the {model.num_layers * model.num_experts} experts of "
                f"{model.num_layers} layers: add workers or raise experts.slots"
            )
    if rescue_only or partial:
        return board.loads
    copies = min(floor, len(seats))
    for least in range(2, copies + 1):
        for expert in board.experts():
            if len(board.holders[expert]) < least:
                board.add(expert, least_copies=copies)
    if wanted is not None:
        board.move(copies)
        return board.loads
    for layer in range(model.num_layers):
        board.even_out(layer, model.num_experts * copies // len(seats), copies)
    return board.loads


def place(current: Placement, workers: Mapping[MemberId, int], *, floor: int) -> Placement:
    """Return a placement in which everything is loaded, for workers with so many slots each.

    Raises:
        PlacementError: The slots do not suffice for one copy of every expert.
    """
    held = {w: dict(current.held_by(w)) for w in workers}
    loads = plan_loads(current, {w: Seat(n) for w, n in workers.items()}, held, floor=floor)
    for load in loads:
        mine = held[load.worker]
        held[load.worker] = {e: s for e, s in mine.items() if s != load.slot}
        held[load.worker][load.expert] = load.slot
    return placement_of(current, held)


def placement_of(model: Placement, held: Mapping[MemberId, Slots]) -> Placement:
    """Return the placement that says what each worker holds."""
    replicas: dict[ExpertId, list[Replica]] = {}
    for worker in sorted(held):
        for expert, slot in held[worker].items():
            replicas.setdefault(expert, []).append(Replica(worker, slot))
    return Placement(
        model.weights_version,
        model.num_layers,
        model.num_experts,
        {expert: tuple(replicas[expert]) for expert in sorted(replicas)},
    )


def slots_needed(num_layers: int, num_experts: int, num_workers: int, floor: int) -> int:
    """Return the slots a worker needs for its even share, and one a layer for lost coverage."""
    replicas = num_layers * num_experts * min(floor, num_workers)
    return -(-replicas // num_workers) + num_layers + 1


class _Board:
    """The replicas while they are being dealt out, with the free slots of each worker."""

    def __init__(
        self,
        model: Placement,
        seats: Mapping[MemberId, Seat],
        held: Mapping[MemberId, Slots],
        *,
        fixed: Mapping[MemberId, Slots],
        doubtful: Collection[MemberId],
        wanted: Wanted,
    ) -> None:
        self._model = model
        self._doubtful = doubtful
        self._seats = seats
        self._wanted = {w: frozenset(wanted.get(w, ())) for w in seats}
        self._fixed = {w: set(slots.values()) for w, slots in fixed.items()}
        self._slot_of = {w: dict(held.get(w, {})) for w in seats}
        self._in_layer: Counter[tuple[MemberId, int]] = Counter()
        self.holders: dict[ExpertId, list[MemberId]] = {e: [] for e in self.experts()}
        self._planned: dict[tuple[MemberId, ExpertId], Load] = {}
        for worker, slots in self._slot_of.items():
            for expert in slots:
                self.holders[expert].append(worker)
                self._in_layer[worker, expert.layer] += 1
        self._free = {
            worker: sorted(set(range(seat.num_slots)) - set(self._slot_of[worker].values()))[::-1]
            for worker, seat in seats.items()
        }

    @property
    def loads(self) -> list[Load]:
        """What was dealt out, in order."""
        return list(self._planned.values())

    def experts(self) -> Iterator[ExpertId]:
        """Yield every expert of the model, layer by layer."""
        for layer in range(self._model.num_layers):
            for expert in range(self._model.num_experts):
                yield ExpertId(layer, expert)

    def num_sound(self, expert: ExpertId) -> int:
        """Return how many copies of an expert are beyond doubt."""
        return sum(worker not in self._doubtful for worker in self.holders[expert])

    def add(self, expert: ExpertId, *, least_copies: int, urgent: bool = False) -> bool:
        """Give an expert one more copy, on the most fitting worker that can take it.

        A worker without a free slot gives up a replica of which more than `least_copies` exist.
        """
        nodes = {self._seats[w].node for w in self.holders[expert]}
        for worker in sorted(
            (w for w in self._seats if w not in self.holders[expert]),
            key=lambda w: (
                expert not in self._wanted[w],
                self._seats[w].node in nodes,
                not self._free[w],
                self._in_layer[w, expert.layer],
                len(self._slot_of[w]),
                w,
            ),
        ):
            if self._give(worker, expert, least_copies, urgent=urgent):
                return True
        return False

    def move(self, least_copies: int) -> None:
        """Give every worker what it should hold, layer by layer; what others gave up makes room."""
        missing = [(e, w) for w in self._seats for e in self._wanted[w] - self._slot_of[w].keys()]
        for expert, worker in sorted(missing):
            self._give(worker, expert, least_copies, move=True)

    def even_out(self, layer: int, share: int, least_copies: int) -> None:
        """Give every worker its share of a layer, taking from those that hold most of it."""
        for worker in sorted(self._seats):
            room = self._seats[worker].num_slots // self._model.num_layers  # it has all layers
            while self._in_layer[worker, layer] < min(share, room):
                offered = self._offered(worker, layer, share)
                if offered is None:
                    break
                planned = self._planned.get(offered)
                urgent = planned is not None and planned.urgent
                if not self._give(worker, offered[1], least_copies, urgent=urgent):
                    break
                if planned is not None:
                    self._recall(planned)

    def _offered(
        self, worker: MemberId, layer: int, share: int
    ) -> tuple[MemberId, ExpertId] | None:
        """Return a worker with more than its share of the layer, and an expert it could give."""
        donors = [w for w in self._seats if self._in_layer[w, layer] > share]
        for donor in sorted(donors, key=lambda w: (-self._in_layer[w, layer], w)):
            for expert in self._slot_of[donor]:
                if expert.layer == layer and worker not in self.holders[expert]:
                    return donor, expert
        return None

    def _recall(self, load: Load) -> None:
        """Take a copy back that was only just planned: it need not be loaded at all."""
        del self._planned[load.worker, load.expert]
        self._drop(load.worker, load.expert)
        self._free[load.worker].append(load.slot)

    def _give(
        self,
        worker: MemberId,
        expert: ExpertId,
        least_copies: int,
        *,
        urgent: bool = False,
        move: bool = False,
    ) -> bool:
        slot = self._free[worker].pop() if self._free[worker] else None
        if slot is None:
            slot = self._vacated(worker, least_copies, unwanted_only=move)
        if slot is None:
            return False
        self._slot_of[worker][expert] = slot
        self.holders[expert].append(worker)
        self._in_layer[worker, expert.layer] += 1
        self._planned[worker, expert] = Load(worker, expert, slot, urgent, move)
        return True

    def _vacated(
        self, worker: MemberId, least_copies: int, *, unwanted_only: bool = False
    ) -> int | None:
        """Take a replica that others have loaded often enough off a worker.

        One that it need not hold, if there is one, from its fullest layer. Never one that is under
        way, or was only just planned: a slot gets one expert at a time.
        """
        fixed, wanted = self._fixed.get(worker, set()), self._wanted[worker]
        mine = self._slot_of[worker]
        spare = [
            expert
            for expert in (mine.keys() - wanted if unwanted_only else mine)
            if mine[expert] not in fixed
            and (worker, expert) not in self._planned
            and self._num_loaded(expert, without=worker) >= least_copies
        ]
        if not spare:
            return None
        fullest = max(spare, key=lambda e: (e not in wanted, self._in_layer[worker, e.layer], e))
        return self._drop(worker, fullest)

    def _num_loaded(self, expert: ExpertId, without: MemberId) -> int:
        """Return how many others have an expert now, beyond doubt."""
        return sum(
            worker != without
            and worker not in self._doubtful
            and (worker, expert) not in self._planned
            and self._slot_of[worker][expert] not in self._fixed.get(worker, ())
            for worker in self.holders[expert]
        )

    def _drop(self, worker: MemberId, expert: ExpertId) -> int:
        self.holders[expert].remove(worker)
        self._in_layer[worker, expert.layer] -= 1
        return self._slot_of[worker].pop(expert)
