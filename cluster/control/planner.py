"""Which worker holds which expert: a pure function from workers and slots to a Placement."""

from collections import Counter
from collections.abc import Collection, Mapping

from workers.errors import PlacementError
from workers.placement import ExpertId, MemberId, Placement, Replica


def place(
    current: Placement,
    workers: Mapping[MemberId, int],
    *,
    floor: int,
    receiving: Collection[MemberId] | None = None,
) -> Placement:
    """Give every expert `floor` replicas on distinct workers, moving nothing that need not move.

    Replicas on workers that still exist stay where they are. Missing ones go, layer by layer, to
    the worker that holds fewest replicas of that layer, then fewest in all, so that each layer is
    spread evenly. With fewer workers or slots than the floor asks for, first copies come before
    second ones.

    Args:
        current: The placement so far; empty at the start. Names the model's layers and experts.
        workers: Number of slots of each worker that may hold experts.
        floor: Copies wanted of each expert; the number of workers bounds it.
        receiving: Workers that may get new replicas; all of them when None.

    Raises:
        PlacementError: The slots do not suffice for one copy of every expert.
    """
    board = _Board(current, workers, workers if receiving is None else receiving)
    experts = [
        ExpertId(layer, expert)
        for layer in range(current.num_layers)
        for expert in range(current.num_experts)
    ]
    for copies in range(1, min(floor, len(workers)) + 1):
        for expert in experts:
            if len(board.replicas[expert]) < copies and not board.add(expert) and copies == 1:
                raise PlacementError(
                    f"{sum(workers.values())} slots on {len(workers)} expert workers cannot hold "
                    f"the {len(experts)} experts of {current.num_layers} layers: add workers or "
                    "raise experts.slots"
                )
    return Placement(
        current.weights_version,
        current.num_layers,
        current.num_experts,
        {expert: tuple(sorted(replicas)) for expert, replicas in board.replicas.items()},
    )


def slots_needed(num_layers: int, num_experts: int, num_workers: int, floor: int) -> int:
    """Return the slots a worker needs for its even share, and one spare for lost coverage."""
    replicas = num_layers * num_experts * min(floor, num_workers)
    return -(-replicas // num_workers) + num_layers + 1


class _Board:
    """The replicas while they are being dealt out, with the free slots of each worker."""

    def __init__(
        self,
        current: Placement,
        workers: Mapping[MemberId, int],
        receiving: Collection[MemberId],
    ) -> None:
        self.replicas: dict[ExpertId, list[Replica]] = {}
        self._in_layer: Counter[tuple[MemberId, int]] = Counter()
        self._in_all: Counter[MemberId] = Counter()
        taken: dict[MemberId, set[int]] = {worker: set() for worker in workers}
        for layer in range(current.num_layers):
            for e in range(current.num_experts):
                expert = ExpertId(layer, e)
                kept = [r for r in current.of(layer, e) if r.worker in workers]
                self.replicas[expert] = kept
                for replica in kept:
                    taken[replica.worker].add(replica.slot)
                    self._count(expert, replica.worker)
        self._free = {
            worker: [s for s in reversed(range(slots)) if s not in taken[worker]]
            for worker, slots in workers.items()
            if worker in receiving
        }

    def add(self, expert: ExpertId) -> bool:
        """Put one more replica of an expert somewhere; False when no worker can take it."""
        holders = {r.worker for r in self.replicas[expert]}
        able = [w for w, free in self._free.items() if free and w not in holders]
        if not able:
            return False
        worker = min(able, key=lambda w: (self._in_layer[w, expert.layer], self._in_all[w], w))
        self.replicas[expert].append(Replica(worker, self._free[worker].pop()))
        self._count(expert, worker)
        return True

    def _count(self, expert: ExpertId, worker: MemberId) -> None:
        self._in_layer[worker, expert.layer] += 1
        self._in_all[worker] += 1
