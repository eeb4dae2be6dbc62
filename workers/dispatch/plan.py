"""Which rows go to which worker: pure, from gate output, placement and the state of the links.

Cost is the number of distinct experts that the busiest worker computes, not rows. So an expert
with one usable replica goes where it must, and then each other one to the worker with the fewest
experts so far; when all are placed, each is looked at once more, and goes to another worker if
that has two fewer by now. Runs once a layer and step, hence numpy tables made once per View and set
of links.
Shape legend: R rows, K experts a row, W workers, E experts, L layers; id -1 means no expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from workers.placement import MemberId, MemberState, View

NO_EXPERT = -1
_UNSERVED = -1
_ABSENT = -2
BIT_K: NDArray[np.uint32] = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))


class Standing(IntEnum):
    """What a worker may be given."""

    UNUSABLE = 0  # no link
    LAST_RESORT = 1  # suspect or draining: only what nobody else holds
    GOOD = 2


@dataclass(slots=True, eq=False)
class PlannedCall:
    """The rows of one message to one worker. `rows_R` None stands for all rows, in order."""

    worker: int
    rows_R: NDArray[np.int64] | None
    ids_RK: NDArray[np.int32]
    masks_R: NDArray[np.uint32]
    num_experts: int


@dataclass(slots=True, eq=False)
class Plan:
    """Calls in order of worker, and the pairs that no usable worker serves (None: all served)."""

    calls: list[PlannedCall]
    unserved: PlannedCall | None


class ReplicaIndex:
    """Which serving worker holds which expert, as one table; made once per View."""

    def __init__(self, view: View) -> None:
        members = view.serving_workers()
        placement = view.placement
        self.order = view.order
        self.workers: tuple[MemberId, ...] = tuple(m.id for m in members)
        self.draining_W = np.array([m.state is MemberState.DRAINING for m in members], dtype=bool)
        shape = (placement.num_layers, len(members), placement.num_experts)
        self.holds_LWE: NDArray[np.bool_] = np.zeros(shape, dtype=bool)
        index_of = {worker: index for index, worker in enumerate(self.workers)}
        for expert, replicas in placement.replicas.items():
            for replica in replicas:
                worker = index_of.get(replica.worker)
                if worker is not None:
                    self.holds_LWE[expert.layer, worker, expert.expert] = True


@dataclass(slots=True, eq=False)
class _LayerTable:
    primary_E: NDArray[np.int16]  # one more entry at the end, for id -1
    several_E: NDArray[np.bool_]
    has_choice: bool
    candidates: list[tuple[int, ...]]


class Planner:
    """Plans calls for one View and one standing of each of its workers.

    `rows_per_call` is what one message holds. `without` names (layer, worker, expert) that a worker
    said it does not hold, whatever the View says. Tables of a layer are made when it is first asked
    for.
    """

    def __init__(
        self,
        index: ReplicaIndex,
        standing: Sequence[Standing],
        *,
        rows_per_call: int,
        without: frozenset[tuple[int, int, int]] = frozenset(),
    ) -> None:
        self.index = index
        self._rows_per_call = rows_per_call
        self._without = without
        self._standing_W = np.array(standing, dtype=np.int8)
        self._tables: list[_LayerTable | None] = [None] * index.holds_LWE.shape[0]

    def plan(
        self,
        layer: int,
        ids_RK: NDArray[np.int32],
        load: Callable[[], Sequence[int]] | None = None,
    ) -> Plan:
        """Assign every (row, expert) to a worker.

        Args:
            layer: Layer index.
            ids_RK: Expert ids; -1 where a row names none.
            load: Says how many experts each worker is already computing for us; asked for only
                when there is a choice, none when None.
        """
        table = self._tables[layer]
        if table is None:
            table = self._tables[layer] = self._make_table(layer)
        activated = None
        choice_E = table.primary_E
        if table.has_choice:
            load_W = load() if load else [0] * len(self.index.workers)
            choice_E, activated = _choose(table, ids_RK, load_W)
        return self._share_out(choice_E[ids_RK], ids_RK, activated)

    def _share_out(
        self, worker_RK: NDArray[np.int16], ids_RK: NDArray[np.int32], activated: list[int] | None
    ) -> Plan:
        """Cut the pairs by worker; each worker gets only the rows that touch it."""
        present = sorted(set(worker_RK.ravel().tolist()) - {_ABSENT})
        mine_NRK = worker_RK == np.array(present, dtype=np.int16)[:, None, None]
        masks_NR = mine_NRK.dot(BIT_K[: ids_RK.shape[1]])
        ids_NRK = np.where(mine_NRK, ids_RK, np.int32(NO_EXPERT))
        whole_N = masks_NR.all(axis=1).tolist()
        calls: list[PlannedCall] = []
        unserved = None
        for n, worker in enumerate(present):
            rows_R = None if whole_N[n] else np.flatnonzero(masks_NR[n])
            call = PlannedCall(
                worker,
                rows_R,
                ids_NRK[n] if rows_R is None else ids_NRK[n][rows_R],
                masks_NR[n] if rows_R is None else masks_NR[n][rows_R],
                activated[worker] if activated and worker >= 0 else 0,
            )
            if worker == _UNSERVED:
                unserved = call
            elif len(call.masks_R) <= self._rows_per_call:
                calls.append(call)
            else:
                calls.extend(_split(call, self._rows_per_call))
        return Plan(calls, unserved)

    def serves(self, layer: int, ids_RK: NDArray[np.int32]) -> bool:
        """Whether each of these experts has a worker in good standing."""
        held_E = self._holds(layer)[self._standing_W == Standing.GOOD].any(axis=0)
        return bool(held_E[ids_RK[ids_RK >= 0]].all())

    def _holds(self, layer: int) -> NDArray[np.bool_]:
        holds_WE: NDArray[np.bool_] = self.index.holds_LWE[layer]
        missing = [(w, e) for at, w, e in self._without if at == layer]
        if missing:
            holds_WE = holds_WE.copy()
            holds_WE[tuple(np.array(missing).T)] = False
        return holds_WE

    def _make_table(self, layer: int) -> _LayerTable:
        holds_WE = self._holds(layer)
        num_workers, num_experts = holds_WE.shape
        primary_E = np.full(num_experts + 1, _UNSERVED, dtype=np.int16)
        primary_E[NO_EXPERT] = _ABSENT
        if num_workers == 0:
            return _LayerTable(primary_E, np.zeros(num_experts, dtype=bool), False, [])
        good_WE = holds_WE & (self._standing_W == Standing.GOOD)[:, None]
        last_WE = holds_WE & (self._standing_W == Standing.LAST_RESORT)[:, None]
        usable_WE = np.where(good_WE.any(axis=0), good_WE, last_WE)
        count_E = usable_WE.sum(axis=0)
        primary_E[:-1][count_E > 0] = usable_WE.argmax(axis=0)[count_E > 0]
        several_E = count_E > 1
        candidates: list[tuple[int, ...]] = [()] * num_experts
        for expert in np.flatnonzero(several_E).tolist():
            candidates[expert] = tuple(np.flatnonzero(usable_WE[:, expert]).tolist())
        return _LayerTable(primary_E, several_E, bool(several_E.any()), candidates)


def _choose(
    table: _LayerTable, ids_RK: NDArray[np.int32], load_W: Sequence[int]
) -> tuple[NDArray[np.int16], list[int]]:
    """Return the worker of each expert [E + 1], and how many experts each worker then computes."""
    seen_E = np.zeros(len(table.primary_E), dtype=bool)
    seen_E[ids_RK] = True
    seen_E[NO_EXPERT] = False
    single = table.primary_E[:-1][seen_E[:-1] & ~table.several_E]
    activated = np.bincount(single[single >= 0], minlength=len(load_W)).tolist()
    busy = [a + b for a, b in zip(activated, load_W, strict=True)]
    several = np.flatnonzero(seen_E[:-1] & table.several_E).tolist()
    if not several:
        return table.primary_E, activated
    chosen = []
    for expert in several:
        best = _least_busy(table.candidates[expert], busy)
        busy[best] += 1
        chosen.append(best)
    _look_again(table, several, chosen, busy)
    choice_E = table.primary_E.copy()
    choice_E[several] = chosen
    return choice_E, [a - b for a, b in zip(busy, load_W, strict=True)]


def _least_busy(workers: tuple[int, ...], busy: list[int]) -> int:
    """Return the worker with the fewest experts, the first of several."""
    best = workers[0]
    for worker in workers[1:]:
        if busy[worker] < busy[best]:
            best = worker
    return best


def _look_again(table: _LayerTable, several: list[int], chosen: list[int], busy: list[int]) -> None:
    """Move each expert once more if another of its workers has two fewer by now, in place."""
    for index, expert in enumerate(several):
        before = chosen[index]
        best = _least_busy(table.candidates[expert], busy)
        if busy[best] + 1 < busy[before]:
            busy[before] -= 1
            busy[best] += 1
            chosen[index] = best


def _split(call: PlannedCall, limit: int) -> list[PlannedCall]:
    """Cut a call into messages of at most `limit` rows."""
    num_rows = len(call.masks_R)
    rows_R = np.arange(num_rows) if call.rows_R is None else call.rows_R
    cuts = [slice(start, start + limit) for start in range(0, num_rows, limit)]
    return [
        PlannedCall(call.worker, rows_R[c], call.ids_RK[c], call.masks_R[c], call.num_experts)
        for c in cuts
    ]
