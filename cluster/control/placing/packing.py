"""Packing replicas onto workers, all layers at once: pure numpy.

Each copy of an expert that a batch activates with share a, of c copies, weighs a/c. Copies are
dealt out from the heaviest to the lightest, each to the worker whose copies weigh least.
Shape legend: L layers, E experts, W workers, S steps of dealing out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NEVER = np.float32(1e9)
_UNLIKELY = np.float32(1e4)  # outweighs every load, and nothing that is forbidden
_NOBODY = -1

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Style:
    """One way of packing.

    `steepness` says how fast a further copy of an expert loses its worth: 1 shares its load evenly,
    more prefers second copies of many experts to third ones of few. `mixing` is how much a worker
    is avoided for already sharing experts with the copy's other holder, in copies' weights.
    `inertia` is how much a worker is preferred for holding the expert now. With `homes` the first
    copies of all experts are dealt out before any other, so many to each worker: where batches
    activate nearly everything, each expert can then be computed at its home. With `even` all
    experts weigh the same and are dealt in order of number, which is that of the gateways' choice.
    """

    steepness: float
    mixing: float
    inertia: float = 0.0
    homes: bool = False
    even: bool = False


def copies_of(
    activation_LE: NDArray[np.float64], room_L: NDArray[np.int64], num_workers: int, *,
    floor: int, style: Style,
) -> NDArray[np.int64]:  # fmt: skip
    """Return how many copies each expert gets, [L, E]: one, then the floor, then by worth.

    Where the slots do not suffice for the floor, the experts that are activated most come first.
    """
    num_layers, num_experts = activation_LE.shape
    most = min(max(floor, 16), num_workers)
    nth_C = np.arange(1, most)  # worth of having one more than so many
    if style.even:
        activation_LE = np.round(activation_LE, 1)
    worth_LEC = activation_LE[:, :, None] / nth_C.astype(np.float64) ** style.steepness
    worth_LEC[:, :, : min(floor, num_workers) - 1] += 2.0 * most  # before all that is beyond it
    worth_LEC -= 1e-9 * np.arange(num_experts)[None, :, None]
    spare_L = np.clip(room_L - num_experts, 0, num_experts * (most - 1))
    copies_LE = np.ones((num_layers, num_experts), dtype=np.int64)
    for layer in range(num_layers):
        spare = int(spare_L[layer])
        if spare:
            chosen = np.argpartition(-worth_LEC[layer].ravel(), spare - 1)[:spare]
            copies_LE[layer] += np.bincount(chosen // (most - 1), minlength=num_experts)
    return copies_LE


def pack(
    activation_LE: NDArray[np.float64],
    copies_LE: NDArray[np.int64],
    room_LW: NDArray[np.int64],
    node_W: Sequence[str],
    held_LEW: Flags,
    *,
    style: Style,
) -> Flags:
    """Return who holds what, [L, E, W]: at most `room_LW`, two copies never on one worker.

    Copies go to distinct nodes where there are some. A copy that fits nowhere is left out; first
    copies always fit when the room suffices for one copy of every expert.
    """
    worth_LE = np.ones_like(activation_LE) if style.even else activation_LE / copies_LE
    weight_LE = worth_LE.astype(np.float32)
    _, num_experts = copies_LE.shape
    homes_LW = _home_rooms(room_LW, num_experts) if style.homes else room_LW
    table = _Table(homes_LW, node_W, num_experts, style)
    holds_LEW = np.zeros(held_LEW.shape, dtype=bool)
    for step, (expert_L, number_L) in enumerate(_in_order(weight_LE, copies_LE, style)):
        if style.homes and step == num_experts:
            table.add_room(room_LW - homes_LW)
        chosen_L = table.deal(
            expert_L,
            number_L,
            weight_LE[table.layers, expert_L],
            held_LEW[table.layers, expert_L],
        )
        dealt = chosen_L != _NOBODY
        holds_LEW[table.layers[dealt], expert_L[dealt], chosen_L[dealt]] = True
    return holds_LEW


def _home_rooms(room_LW: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Return how many first copies each worker takes of each layer, in proportion to its room."""
    wanted_LW = room_LW * num_experts
    homes_LW: NDArray[np.int64] = -(-wanted_LW // room_LW.sum(axis=1, keepdims=True))
    return homes_LW


def _in_order(
    weight_LE: NDArray[np.float32], copies_LE: NDArray[np.int64], style: Style
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the steps: the expert of each layer, and how many of its copies came before.

    A layer with fewer copies than others has -1 for a number at its last steps.
    """
    num_layers = len(weight_LE)
    num_steps = int(copies_LE.sum(axis=1).max())
    expert_LS = np.zeros((num_layers, num_steps), dtype=np.int64)
    number_LS = np.full((num_layers, num_steps), -1, dtype=np.int64)
    for layer in range(num_layers):
        order_E = np.argsort(-weight_LE[layer], kind="stable")
        copies_E = copies_LE[layer, order_E]
        experts_S = np.repeat(order_E, copies_E)
        first_S = np.repeat(np.cumsum(copies_E) - copies_E, copies_E)
        numbers_S = np.arange(len(experts_S)) - first_S
        if style.homes:
            homes_first_S = np.argsort(numbers_S > 0, kind="stable")
            experts_S, numbers_S = experts_S[homes_first_S], numbers_S[homes_first_S]
        expert_LS[layer, : len(experts_S)] = experts_S
        number_LS[layer, : len(experts_S)] = numbers_S
    return [(expert_LS[:, s], number_LS[:, s]) for s in range(num_steps)]


class _Table:
    """The workers of every layer while copies are dealt out."""

    def __init__(
        self,
        room_LW: NDArray[np.int64],
        node_W: Sequence[str],
        num_experts: int,
        style: Style,
    ) -> None:
        num_layers, num_workers = room_LW.shape
        self.layers = np.arange(num_layers)
        self._style = style
        self._home_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._free_LW = np.zeros_like(room_LW)
        self.add_room(room_LW)
        self._load_LW = np.zeros((num_layers, num_workers), dtype=np.float32)
        # What keeps the next copy of the same expert away: its other holders, and their nodes.
        self._away_LW = np.zeros((num_layers, num_workers), dtype=np.float32)
        self._shared_LW = np.zeros((num_layers, num_workers), dtype=np.float32)
        self._shared_LWW = np.zeros((num_layers, num_workers, num_workers), dtype=np.float32)
        names = np.array(node_W)
        self._near_WW = np.where(names[:, None] == names[None, :], _UNLIKELY, np.float32(0))
        if len(set(node_W)) == 1:
            self._near_WW[:] = 0
        np.fill_diagonal(self._near_WW, _NEVER)

    def add_room(self, room_LW: NDArray[np.int64]) -> None:
        """Let workers take so many copies more."""
        self._free_LW += room_LW
        self._full_LW = np.where(self._free_LW > 0, np.float32(0), _NEVER)

    def deal(
        self,
        expert_L: NDArray[np.int64],
        number_L: NDArray[np.int64],
        weight_L: NDArray[np.float32],
        held_LW: Flags,
    ) -> NDArray[np.int64]:
        """Give one copy of one expert in every layer; returns who gets it, -1 for nobody."""
        self._turn_to(expert_L, number_L)
        cost_LW = self._load_LW + self._full_LW + self._away_LW
        if self._style.mixing:
            cost_LW += (self._style.mixing * weight_L)[:, None] * self._shared_LW
        if self._style.inertia:
            cost_LW -= (self._style.inertia * weight_L)[:, None] * held_LW
        chosen_L = cost_LW.argmin(axis=1)
        layers = self.layers[(cost_LW[self.layers, chosen_L] < _NEVER / 2) & (number_L >= 0)]
        chosen = chosen_L[layers]
        self._load_LW[layers, chosen] += weight_L[layers]
        self._free_LW[layers, chosen] -= 1
        self._full_LW[layers, chosen] = np.where(self._free_LW[layers, chosen] > 0, 0, _NEVER)
        if self._style.mixing:
            self._note_shared(layers, chosen)
        self._away_LW[layers] += self._near_WW[chosen]
        homes = number_L[layers] == 0
        self._home_LE[layers[homes], expert_L[layers[homes]]] = chosen[homes]
        found_L = np.full(len(self.layers), _NOBODY, dtype=np.int64)
        found_L[layers] = chosen
        return found_L

    def _turn_to(self, expert_L: NDArray[np.int64], number_L: NDArray[np.int64]) -> None:
        """Look at other experts than before: at who holds them already."""
        first = number_L <= 0
        self._away_LW[first] = 0
        self._shared_LW[first] = 0
        second = self.layers[number_L == 1]
        if self._style.homes and len(second):  # its home was dealt long before
            home = self._home_LE[second, expert_L[second]]
            self._away_LW[second] = self._near_WW[home]
            self._shared_LW[second] = self._shared_LWW[second, home]

    def _note_shared(self, layers: NDArray[np.int64], chosen: NDArray[np.int64]) -> None:
        row, other = np.nonzero(self._away_LW[layers] >= _NEVER / 2)
        at, mine = layers[row], chosen[row]
        self._shared_LWW[at, mine, other] += 1
        self._shared_LWW[at, other, mine] += 1
        self._shared_LW[layers] += self._shared_LWW[layers, chosen]
