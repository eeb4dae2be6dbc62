"""Where the replicas of every expert should lie, by what is asked of them: pure numpy.

Several ways of packing are tried, and each layer takes the one whose busiest worker is expected to
compute fewest experts; what is held now is one of them, so that no layer is ever made worse. Layers
change in order of what they gain by a move, as far as the moves go.
Shape legend: L layers, E experts, W workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.control.placing.forecast import busiest_L, draw_batches
from cluster.control.placing.packing import Flags, Style, copies_of, pack
from cluster.control.planner import Seat, Slots
from workers.errors import PlacementError
from workers.placement import ExpertId, MemberId, Placement

_NUM_BATCHES = 16  # drawn for each layer; the same ones judge every way of packing
_NUM_DENSE = 8  # where half of the experts are active: such batches differ little
_PLAIN = Style(1.0, 0.0)  # the best where nearly all is active and few have two copies, else never
_FRESH = (
    Style(2.0, 1.0),
    Style(2.0, 1.0, homes=True),
    Style(1.0, 1.0, homes=True, even=True),
)
_STICKY = (
    Style(2.0, 1.0, inertia=2.0),
    Style(2.0, 1.0, inertia=8.0),
    Style(2.0, 1.0, inertia=2.0, homes=True),
    Style(1.0, 1.0, inertia=2.0, homes=True, even=True),
)


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Who should hold what, and what that is expected to bring.

    `busiest_L` is the mean number of experts that the busiest worker of a layer computes for a
    batch, `busiest_before_L` the same for what is held now; infinite where experts lack a copy.
    """

    workers: tuple[MemberId, ...]
    holds_LEW: Flags
    busiest_L: NDArray[np.float64]
    busiest_before_L: NDArray[np.float64]
    num_moves: int

    @property
    def gain(self) -> float:
        """Return the share of the busiest workers' experts that is saved, over all layers."""
        before = float(self.busiest_before_L.sum())
        if not np.isfinite(before):
            return 1.0
        return 1.0 - float(self.busiest_L.sum()) / before if before else 0.0

    def held_by(self, worker: MemberId) -> list[ExpertId]:
        """Return what one worker should hold, layer by layer."""
        holds_LE = self.holds_LEW[:, :, self.workers.index(worker)]
        return [ExpertId(int(layer), int(expert)) for layer, expert in np.argwhere(holds_LE)]


def plan_target(
    model: Placement,
    seats: Mapping[MemberId, Seat],
    held: Mapping[MemberId, Slots],
    activation_LE: NDArray[np.float64],
    *,
    floor: int,
    max_moves: int | None = None,
    seed: int = 0,
) -> Target:
    """Return where replicas should lie.

    Every expert keeps `floor` copies as far as the slots allow, never two on one worker, and on
    distinct nodes where there are some. One slot of each worker stays free, so that a copy can be
    loaded before another is overwritten.

    Args:
        model: Names the model's layers and experts; its replicas are not looked at.
        seats: The workers, with their slots.
        held: What each holds now.
        activation_LE: The share of batches that activate each expert, at the batch size in use.
        floor: Copies wanted of each expert.
        max_moves: Replicas that may be loaded; None for any number.
        seed: Of the batches that are drawn.

    Raises:
        PlacementError: The slots do not suffice for one copy of every expert.
    """
    workers = tuple(sorted(seats))
    shape = (model.num_layers, model.num_experts, len(workers))
    room_LW = _rooms([seats[w].num_slots for w in workers], model)
    node_W = [seats[w].node for w in workers]
    held_LEW = _holdings(shape, workers, held)
    is_dense = float(activation_LE.mean()) > 0.5
    batches_LNE = draw_batches(activation_LE, _NUM_DENSE if is_dense else _NUM_BATCHES, seed)
    best = _Best(held_LEW, batches_LNE, floor)
    fresh = (_PLAIN, *_FRESH) if is_dense and floor == 1 else _FRESH
    for style in _STICKY if held_LEW.any() else fresh:
        copies_LE = copies_of(
            activation_LE, room_LW.sum(axis=1), len(workers), floor=floor, style=style
        )
        holds_LEW = pack(activation_LE, copies_LE, room_LW, node_W, held_LEW, style=style)
        mend(holds_LEW, room_LW, node_W, np.minimum(copies_LE, floor))
        best.offer(holds_LEW)
    return best.within(workers, np.array([seats[w].num_slots for w in workers]), max_moves)


def mend(
    holds_LEW: Flags,
    room_LW: NDArray[np.int64],
    node_W: Sequence[str],
    wanted_LE: NDArray[np.int64],
) -> None:
    """Give copies that fitted nowhere their place, in place, by moving another one out of the way.

    The last copies dealt out may find only workers with room that hold the expert already.
    """
    lacking = np.argwhere(holds_LEW.sum(axis=2) < wanted_LE)
    for layer, expert in lacking:
        holds_EW, room_W = holds_LEW[layer], room_LW[layer]
        for _ in range(int(wanted_LE[layer, expert] - holds_EW[expert].sum())):
            _make_way(holds_EW, room_W, node_W, int(expert))


def _make_way(
    holds_EW: Flags, room_W: NDArray[np.int64], node_W: Sequence[str], expert: int
) -> None:
    """Move some copy from a full worker to one with room, and give the expert its slot."""
    nodes = {node_W[w] for w in np.flatnonzero(holds_EW[expert]).tolist()}
    roomy = np.flatnonzero(holds_EW.sum(axis=0) < room_W)
    full = np.flatnonzero(~holds_EW[expert] & (room_W > 0))
    for giver in sorted(full.tolist(), key=lambda w: (node_W[w] in nodes, w)):
        for taker in roomy.tolist():
            movable = np.flatnonzero(holds_EW[:, giver] & ~holds_EW[:, taker])
            if len(movable):
                holds_EW[movable[0], giver] = False
                holds_EW[movable[0], taker] = True
                holds_EW[expert, giver] = True
                return


class _Best:
    """For every layer, the best that was offered, and what is held now."""

    def __init__(self, held_LEW: Flags, batches_LNE: Flags, floor: int) -> None:
        self._held_LEW = held_LEW
        self._batches_LNE = batches_LNE
        copies_LE = held_LEW.sum(axis=2)
        self._before_L = busiest_L(held_LEW, batches_LNE)
        self._before_L[(copies_LE == 0).any(axis=1)] = np.inf
        # A layer below its floor takes what is offered, whatever it is expected to bring.
        self._floor_L = np.minimum(copies_LE, floor).sum(axis=1)
        self._held_copies = int(self._floor_L.sum())
        self._floor = floor
        self._holds_LEW = held_LEW.copy()
        self._busiest_L = self._before_L.copy()
        self._whole: tuple[int, float, Flags] | None = None  # the best that was offered as one

    def offer(self, holds_LEW: Flags) -> None:
        """Take the layers that are better than what there was."""
        found_L = busiest_L(holds_LEW, self._batches_LNE)
        floor_L = np.minimum(holds_LEW.sum(axis=2), self._floor).sum(axis=1)
        better_L = (floor_L > self._floor_L) | (
            (floor_L == self._floor_L) & (found_L < self._busiest_L)
        )
        self._holds_LEW[better_L] = holds_LEW[better_L]
        self._busiest_L[better_L] = found_L[better_L]
        self._floor_L[better_L] = floor_L[better_L]
        num_copies, busiest = int(floor_L.sum()), float(found_L.sum())
        if self._whole is None or (-num_copies, busiest) < (-self._whole[0], self._whole[1]):
            self._whole = num_copies, busiest, holds_LEW

    def within(
        self, workers: tuple[MemberId, ...], slots_W: NDArray[np.int64], max_moves: int | None
    ) -> Target:
        """Return the best of every layer; beyond so many moves, layers stay as they are.

        Layers that were packed apart, or stay as they are, may not fit on a worker together. Then
        all take what was packed as one, or nothing changes if that is no better or too many moves.
        """
        target = self._mixed(workers, max_moves)
        if self._whole is None or (target.holds_LEW.sum(axis=(0, 1)) <= slots_W).all():
            return target
        num_copies, busiest, holds_LEW = self._whole
        num_moves = int((holds_LEW & ~self._held_LEW).sum())
        is_better = (-num_copies, busiest) < (-self._held_copies, float(self._before_L.sum()))
        if not is_better or (max_moves is not None and num_moves > max_moves):
            return Target(workers, self._held_LEW, self._before_L, self._before_L, 0)
        found_L = busiest_L(holds_LEW, self._batches_LNE)
        return Target(workers, holds_LEW, found_L, self._before_L, num_moves)

    def _mixed(self, workers: tuple[MemberId, ...], max_moves: int | None) -> Target:
        moves_L = (self._holds_LEW & ~self._held_LEW).sum(axis=(1, 2))
        left = int(moves_L.sum()) if max_moves is None else max_moves
        with np.errstate(invalid="ignore"):
            gain_L = np.nan_to_num(self._before_L - self._busiest_L, nan=0.0, posinf=np.inf)
        holds_LEW, found_L = self._held_LEW.copy(), self._before_L.copy()
        num_moves = 0
        for layer in np.argsort(-gain_L / np.maximum(moves_L, 1), kind="stable"):
            if moves_L[layer] <= left - num_moves:
                num_moves += int(moves_L[layer])
                holds_LEW[layer] = self._holds_LEW[layer]
                found_L[layer] = self._busiest_L[layer]
        return Target(workers, holds_LEW, found_L, self._before_L, num_moves)


def _rooms(slots_W: Sequence[int], model: Placement) -> NDArray[np.int64]:
    """Return how many slots each layer may use of each worker, [L, W], as evenly as can be.

    Raises PlacementError when a layer's experts do not fit.
    """
    num_layers, needed = model.num_layers, model.num_layers * model.num_experts
    spare = 1 if sum(max(s - 1, 0) for s in slots_W) >= needed else 0
    room_LW = np.zeros((num_layers, len(slots_W)), dtype=np.int64)
    first = 0
    for worker, num_slots in enumerate(slots_W):
        usable = min(max(num_slots - spare, 0), needed)
        room_LW[:, worker] = usable // num_layers
        for extra in range(usable % num_layers):
            room_LW[(first + extra) % num_layers, worker] += 1
        first += usable % num_layers
    if (room_LW.sum(axis=1) < model.num_experts).any():
        raise PlacementError(
            f"{sum(slots_W)} slots on {len(slots_W)} expert workers cannot hold the {needed} "
            f"experts of {num_layers} layers: add workers or raise experts.slots"
        )
    return room_LW


def _holdings(
    shape: tuple[int, int, int], workers: tuple[MemberId, ...], held: Mapping[MemberId, Slots]
) -> Flags:
    holds_LEW = np.zeros(shape, dtype=bool)
    for number, worker in enumerate(workers):
        experts = np.array([(e.layer, e.expert) for e in held.get(worker, ())], dtype=np.int64)
        if len(experts):
            holds_LEW[experts[:, 0], experts[:, 1], number] = True
    return holds_LEW
