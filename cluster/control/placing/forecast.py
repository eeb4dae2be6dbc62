"""How many experts the busiest worker will compute: drawn batches, through the gateways' choice.

The cost of a layer is the number of distinct experts that its busiest worker computes. A placement
is judged by the mean of that over batches drawn from the activation shares, in which each expert is
activated or not by itself. Gateways send an expert with one copy where it must go, then each other
one, in order, to the holder with fewest so far, and look at each once more; the same is done here,
for many batches at once (`workers.dispatch.plan`; a test keeps them equal).
Shape legend: L layers, E experts, W workers, N batches, X a layer's batch.
"""

import numpy as np
from numpy.typing import NDArray

_ELSEWHERE = np.float32(1e6)

Flags = NDArray[np.bool_]


def draw_batches(activation_LE: NDArray[np.float64], num_batches: int, seed: int) -> Flags:
    """Draw which experts each batch of each layer activates, as [L, N, E]."""
    num_layers, num_experts = activation_LE.shape
    drawn_LNE = np.random.default_rng(seed).random((num_layers, num_batches, num_experts))
    return drawn_LNE < activation_LE[:, None, :]


def activated_LNW(holds_LEW: Flags, batches_LNE: Flags) -> NDArray[np.float32]:
    """Return how many experts each worker computes for each batch, as [L, N, W].

    An expert that nobody holds is computed nowhere.
    """
    copies_LE = holds_LEW.sum(axis=2)
    single_LE = copies_LE == 1
    forced_LNE = (batches_LNE & single_LE[:, None, :]).astype(np.float32)
    load_LNW: NDArray[np.float32] = forced_LNE @ holds_LEW.astype(np.float32)
    num_layers, num_batches, num_workers = load_LNW.shape
    load_XW = load_LNW.reshape(-1, num_workers)  # layer and batch in one
    placed: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]] = []
    for expert in range(holds_LEW.shape[1]):
        active_LN = batches_LNE[:, :, expert] & (copies_LE[:, expert] > 1)[:, None]
        (at,) = np.nonzero(active_LN.ravel())
        if not len(at):
            continue
        away_LW = np.where(holds_LEW[:, expert], np.float32(0), _ELSEWHERE)
        away_XW = away_LW[at // num_batches]
        chosen = (load_XW[at] + away_XW).argmin(axis=1)
        load_XW[at, chosen] += 1
        placed.append((at, away_XW, chosen))
    for at, away_XW, chosen in placed:  # once more: two fewer elsewhere by now?
        load = load_XW[at] + away_XW
        best = load.argmin(axis=1)
        rows = np.arange(len(at))
        moves = load[rows, best] + 1 < load[rows, chosen]
        load_XW[at[moves], chosen[moves]] -= 1
        load_XW[at[moves], best[moves]] += 1
    return load_XW.reshape(num_layers, num_batches, num_workers)


def busiest_L(holds_LEW: Flags, batches_LNE: Flags) -> NDArray[np.float64]:
    """Return the mean number of experts that the busiest worker of each layer computes."""
    mean_L: NDArray[np.float64] = activated_LNW(holds_LEW, batches_LNE).max(axis=2).mean(axis=1)
    return mean_L
