"""How many experts the busiest worker will compute: drawn batches, through the gateways' choice.

The cost of a layer is the number of distinct experts that its busiest worker computes. A placement
is judged by the mean of that over batches drawn from the activation shares, in which each expert is
activated or not by itself. Gateways send an expert with one copy where it must go, and then each
other one, in order, to the holder with fewest so far; the same is done here, for many batches at
once.
Shape legend: L layers, E experts, W workers, N batches.
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
    for expert in range(holds_LEW.shape[1]):
        (layers,) = np.nonzero(copies_LE[:, expert] > 1)
        if not len(layers):
            continue
        away_LW = np.where(holds_LEW[layers, expert], np.float32(0), _ELSEWHERE)
        of, batch = np.nonzero(batches_LNE[layers, :, expert])
        at = layers[of]
        chosen = (load_LNW[at, batch] + away_LW[of]).argmin(axis=1)
        load_LNW[at, batch, chosen] += 1
    return load_LNW


def busiest_L(holds_LEW: Flags, batches_LNE: Flags) -> NDArray[np.float64]:
    """Return the mean number of experts that the busiest worker of each layer computes."""
    mean_L: NDArray[np.float64] = activated_LNW(holds_LEW, batches_LNE).max(axis=2).mean(axis=1)
    return mean_L
