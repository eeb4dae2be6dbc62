"""What each worker has loaded, is loading, and has been asked to load: the truth behind a View."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from cluster.control.planner import Load, placement_of
from workers.placement import ExpertId, MemberId, Placement

_TOLERANCE = 0.05  # of an expert's largest output; other devices round otherwise


@dataclass(slots=True)
class _Due:
    """What an expert makes of a fixed row, and the workers that are here and say so."""

    values: tuple[float, ...]
    workers: set[MemberId]


class Fingerprints:
    """What each expert makes of a fixed row, by the workers that loaded it."""

    def __init__(self) -> None:
        self._of: dict[ExpertId, _Due] = {}

    def compare(self, worker: MemberId, found: Mapping[ExpertId, tuple[float, ...]]) -> str:
        """Keep what is new; returns what contradicts a replica, or nothing."""
        for expert, values in found.items():
            due = self._of.get(expert) or _Due(values, {worker})
            if len(values) != len(due.values) or any(
                not abs(value - other) <= _TOLERANCE
                for value, other in zip(values, due.values, strict=True)
            ):
                first = min(due.workers)
                return f"{expert} computes something else than its replica on {first} does"
            due.workers.add(worker)
            self._of[expert] = due
        return ""

    def forget(self, worker: MemberId) -> None:
        """Drop what only a worker that has left said: it may be why others seemed strange."""
        for due in self._of.values():
            due.workers.discard(worker)
        self._of = {expert: due for expert, due in self._of.items() if due.workers}


class ReplicaBook:
    """Counts a replica from the moment its worker has said that it is loaded and verified.

    One batch of loads is under way at each worker at most. A slot that is about to be overwritten
    leaves the placement first.
    """

    def __init__(self, model: Placement) -> None:
        self._model = model
        self._loaded: dict[MemberId, dict[ExpertId, int]] = {
            worker: dict(model.held_by(worker))
            for replicas in model.replicas.values()
            for worker in {r.worker for r in replicas}
        }
        self._loading: dict[MemberId, dict[ExpertId, int]] = {}
        self.version = 0  # rises with every change

    @property
    def model(self) -> Placement:
        """The model's layers and experts."""
        return self._model

    @property
    def loading(self) -> Mapping[MemberId, Mapping[ExpertId, int]]:
        """What is under way."""
        return self._loading

    @property
    def num_loading(self) -> int:
        """Replicas that are under way."""
        return sum(len(batch) for batch in self._loading.values())

    def loaded(self, worker: MemberId) -> Mapping[ExpertId, int]:
        """Return the slot of every expert that a worker has loaded."""
        return self._loaded.get(worker, {})

    def has_any(self, worker: MemberId) -> bool:
        """Whether a worker has loaded an expert, or is about to."""
        return bool(self._loaded.get(worker) or self._loading.get(worker))

    def held(self) -> dict[MemberId, dict[ExpertId, int]]:
        """Return what every worker has loaded or will have when its batch has ended."""
        workers = self._loaded.keys() | self._loading.keys()
        return {w: {**self._loaded.get(w, {}), **self._loading.get(w, {})} for w in workers}

    def begin(self, worker: MemberId, loads: Iterable[Load]) -> dict[ExpertId, int]:
        """Note a batch as under way; returns the slot of each expert of it."""
        assert worker not in self._loading, worker
        batch = {load.expert: load.slot for load in loads}
        taken = set(batch.values())
        kept = {e: s for e, s in self.loaded(worker).items() if s not in taken}
        self._loaded[worker] = kept
        self._loading[worker] = batch
        self.version += 1
        return batch

    def finish(self, worker: MemberId, *, done: bool) -> None:
        """Note that a worker's batch has ended; what was not done is as if never begun."""
        batch = self._loading.pop(worker, None)
        if batch is None:
            return
        if done:
            self._loaded.setdefault(worker, {}).update(batch)
        self.version += 1

    def forget(self, worker: MemberId) -> None:
        """Drop a worker that is gone."""
        self._loaded.pop(worker, None)
        self._loading.pop(worker, None)
        self.version += 1

    def placement(self) -> Placement:
        """Return what is loaded, as Views say it."""
        return placement_of(self._model, self._loaded)

    def uncovered(self, serving: Collection[MemberId]) -> int:
        """Return how many experts none of these workers has loaded."""
        covered = {e for w in serving for e in self._loaded.get(w, ())}
        return self._model.num_layers * self._model.num_experts - len(covered)

    def covers(self, worker: MemberId, others: Collection[MemberId]) -> bool:
        """Whether others have loaded everything that a worker has."""
        elsewhere = {e for w in others if w != worker for e in self._loaded.get(w, ())}
        return self.loaded(worker).keys() <= elsewhere
