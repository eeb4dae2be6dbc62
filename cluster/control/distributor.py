"""Which loads begin now, cell by cell, so that every worker comes to hold what it should.

Planned anew only when something has changed. Nothing is done here: whoever asks carries it out.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import structlog

from cluster.control.assignment import Assignment, assign, seats_of
from cluster.control.health import is_suspect
from cluster.control.lifecycle import Life
from cluster.control.options import ControllerOptions, Desired
from cluster.control.placing.rebalance import Rebalancer
from cluster.control.planner import Load
from cluster.control.replicas import ReplicaBook
from cluster.control.staffing import shares_of
from cluster.control.status import Rebalance
from workers.dispatch.tally import LoadReport
from workers.placement import MemberId, Placement

_log = structlog.get_logger("controller")


@dataclass(slots=True)
class _Cell:
    """The workers of one cell: how they stood when loads were last planned."""

    rebalancer: Rebalancer
    complete_s: float
    placed_s: float
    was_complete: bool = False
    planned_for: tuple[object, ...] = ()
    assignment: Assignment = field(default_factory=Assignment)


class Distributor:
    """Plans the loads of every cell's workers, by what is lacking and by load."""

    def __init__(
        self,
        book: ReplicaBook,
        model: Placement,
        desired: Desired,
        options: ControllerOptions,
        now_s: float,
    ) -> None:
        self._book = book
        self._num_experts = model.num_layers * model.num_experts
        self._floor = desired.floor
        self._options = options
        self._cells = [
            _Cell(Rebalancer(model, options.rebalance, now_s), now_s, now_s)
            for _ in range(desired.cells)
        ]
        self._held_off_s: dict[MemberId, float] = {}

    def is_whole(self, cell: int, workers: Collection[Life]) -> bool:
        """Whether nothing is to be loaded, or being loaded, by the workers of a cell."""
        if not 0 <= cell < len(self._cells):
            return True
        here = {w.member.id for w in workers if w.member.cell == cell}
        return not self._cells[cell].assignment.num_missing and here.isdisjoint(self._book.loading)

    @property
    def num_moves(self) -> int:
        """Loads that are still to come for the sake of balance."""
        return sum(cell.assignment.num_moves for cell in self._cells)

    @property
    def shortage(self) -> str:
        """What cannot be placed; "" when all can."""
        found = {n: c.assignment.shortage for n, c in enumerate(self._cells)}
        named = [f"cell {n}: {s}" if len(found) > 1 else s for n, s in found.items() if s]
        return "; ".join(named)

    @property
    def last_rebalance(self) -> Rebalance | None:
        """The placement that was last made by load, in any cell."""
        made = [c.rebalancer.last for c in self._cells if c.rebalancer.last is not None]
        return max(made, key=lambda rebalance: rebalance.at_s, default=None)

    def lacking_s(self, now_s: float) -> float:
        """Return for how long some expert has lacked a wanted copy; 0 while none does."""
        since = [c.placed_s for c in self._cells if c.assignment.num_missing]
        return now_s - min(since) if since else 0.0

    def hear(self, cell: int, report: LoadReport, now_s: float) -> None:
        """Take what a gateway's rank of a cell has counted."""
        if 0 <= cell < len(self._cells):
            self._cells[cell].rebalancer.hear(report, now_s)

    def hold_off(self, worker: MemberId, now_s: float) -> None:
        """Give a worker that could not load no work for a while."""
        self._held_off_s[worker] = now_s + self._options.restore_s

    def forget(self, worker: MemberId) -> None:
        """Drop a worker that is gone."""
        self._held_off_s.pop(worker, None)

    def due(
        self, workers: Collection[Life], wanted: int, now_s: float
    ) -> Mapping[MemberId, list[Load]]:
        """Return the batches of loads that are to begin now.

        Args:
            workers: All expert workers.
            wanted: How many of them are wanted in all cells.
            now_s: The time.
        """
        cells = range(len(self._cells))
        here = [[w for w in workers if w.enlisted and w.member.cell == cell] for cell in cells]
        crews = [[w for w in workers_here if not w.leaving] for workers_here in here]
        shares = shares_of(wanted, [len(crew) for crew in crews])
        batches: dict[MemberId, list[Load]] = {}
        for cell in cells:
            batches |= self._due_in(self._cells[cell], here[cell], crews[cell], shares[cell], now_s)
        return batches

    def _due_in(
        self,
        cell: _Cell,
        workers: Collection[Life],
        crew: Collection[Life],
        share: int,
        now_s: float,
    ) -> Mapping[MemberId, list[Load]]:
        complete = len(crew) >= share and all(w.is_settled for w in crew)
        rescue_only = not complete and now_s < cell.complete_s + self._options.restore_s
        if complete:
            cell.complete_s, cell.was_complete = now_s, True
        elif not any(self._book.has_any(w.member.id) for w in workers):
            # The first share goes to all that are coming, not to whoever is first.
            if not cell.was_complete:
                return {}
            if rescue_only:
                cell.assignment = Assignment(num_missing=self._num_experts)
                return {}
        doubtful = frozenset(w.member.id for w in crew if is_suspect(w, self._options, now_s))
        held_off = frozenset(
            w.member.id for w in crew if self._held_off_s.get(w.member.id, now_s) > now_s
        )
        if complete and not doubtful and not held_off:
            self._rebalance(cell, crew, now_s, calm=len(crew) == len(workers))
        state = (
            self._book.version,
            tuple((w.member.id, w.phase) for w in crew),
            doubtful,
            held_off,
            rescue_only,
            cell.rebalancer.last,
        )
        if state == cell.planned_for:
            return {}
        cell.assignment = assign(
            self._book,
            [w for w in crew if w.member.id not in held_off],
            floor=self._floor,
            doubtful=doubtful,
            rescue_only=rescue_only,
            wanted=cell.rebalancer.wanted,
        )
        if not cell.assignment.num_missing:
            cell.placed_s = now_s
        cell.planned_for = state
        return cell.assignment.batches

    def _rebalance(self, cell: _Cell, crew: Collection[Life], now_s: float, *, calm: bool) -> None:
        """Have replicas lie elsewhere if the load says that it pays."""
        seats = seats_of(crew)
        loads = not seats.keys().isdisjoint(self._book.loading)
        calm = calm and not loads and not cell.assignment.num_missing
        if not cell.rebalancer.is_due(seats, calm=calm, now_s=now_s):
            return
        taken = cell.rebalancer.consider(seats, self._book.held(), floor=self._floor, now_s=now_s)
        if taken is not None:
            _log.info("rebalance", moves=taken.num_moves, gain=round(taken.gain, 3))
