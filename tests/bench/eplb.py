"""Placements to compare with: round-robin, and replication and packing by token counts.

The second is what deepseek-ai/EPLB describes: replicas are added one by one to the expert with the
greatest count per replica, then dealt out, from the heaviest to the lightest, to the GPU with the
least count that has room, in bins of equal cardinality. Nothing keeps two replicas of one expert
off one worker there; a second one does nothing for the count of distinct experts. With a floor,
which EPLB does not know, every expert gets so many replicas before any is added by count, on
distinct workers where room is left, so that it survives as many deaths as our placements.
Shape legend: L layers, E experts, W workers.
"""

import numpy as np
from numpy.typing import NDArray

Flags = NDArray[np.bool_]


def round_robin(shares_LE: NDArray[np.float64], num_workers: int, room: int) -> Flags:
    """Deal experts out in order of their number, again and again while there is room, [L, E, W]."""
    num_layers, num_experts = shares_LE.shape
    holds_EW = np.zeros((num_experts, num_workers), dtype=bool)
    place = 0
    for copy in range(num_workers * room):
        expert = copy % num_experts
        if expert == 0 and copy:
            place += 1  # so that second copies lie elsewhere
        holds_EW[expert, (expert + place) % num_workers] = True
    full = holds_EW.sum(axis=0) > room
    assert not full.any()
    return np.broadcast_to(holds_EW, (num_layers, *holds_EW.shape)).copy()


def by_token_count(
    shares_LE: NDArray[np.float64], num_workers: int, room: int, *, floor: int = 1
) -> Flags:
    """Replicate by greatest count per replica, then pack into bins of `room` replicas."""
    num_layers, num_experts = shares_LE.shape
    layers = np.arange(num_layers)
    copies_LE = np.full((num_layers, num_experts), floor, dtype=np.int64)
    for _ in range(num_workers * room - floor * num_experts):
        copies_LE[layers, (shares_LE / copies_LE).argmax(axis=1)] += 1
    holds_LEW = np.zeros((num_layers, num_experts, num_workers), dtype=bool)
    for layer in layers:
        count_E = shares_LE[layer] / copies_LE[layer]
        order_E = np.argsort(-count_E, kind="stable")
        free_W = np.full(num_workers, room)
        load_W = np.zeros(num_workers)
        for expert in np.repeat(order_E, copies_LE[layer, order_E]).tolist():
            fits_W = free_W > 0
            if floor > 1 and (fits_W & ~holds_LEW[layer, expert]).any():
                fits_W &= ~holds_LEW[layer, expert]
            worker = int(np.where(fits_W, load_W, np.inf).argmin())
            holds_LEW[layer, expert, worker] = True
            free_W[worker] -= 1
            load_W[worker] += count_E[expert]
    return holds_LEW
