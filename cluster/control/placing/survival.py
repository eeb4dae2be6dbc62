"""Which rows would wait if workers died: pure.

Shape legend: L layers, E experts, W workers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.placement import ExpertId

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Survival:
    """What a placement survives.

    `parked_by_one` are the experts that the death of some one worker leaves without a copy.
    `pairs_survived` is the share of the pairs of workers that may die together without such an
    expert, and `parked_by_pair` the most experts that one pair takes along.
    """

    parked_by_one: tuple[ExpertId, ...]
    pairs_survived: float
    parked_by_pair: int


def survival_of(holds_LEW: Flags) -> Survival:
    """Return what a placement survives; for it, an expert without any copy is parked already."""
    copies_LE = holds_LEW.sum(axis=2)
    parked = tuple(ExpertId(int(layer), int(e)) for layer, e in np.argwhere(copies_LE < 2))
    num_workers = holds_LEW.shape[2]
    alone_W = holds_LEW[copies_LE == 1].sum(axis=0).astype(np.float32)
    two_PW = holds_LEW[copies_LE == 2].astype(np.float32)
    lost_WW = two_PW.T @ two_PW + alone_W[:, None] + alone_W[None, :]
    pairs_P = lost_WW[np.triu_indices(num_workers, 1)] + float((copies_LE == 0).sum())
    if not len(pairs_P):
        return Survival(parked, 1.0, 0)
    return Survival(parked, float((pairs_P == 0).mean()), int(pairs_P.max()))
