"""Which pairs of which calls are computed together: pure.

Everything that waits is taken at once, calls of one layer together, whatever gateway they are
from, and their pairs are grouped by expert. Shape legend: R rows of all calls of a layer, K experts
a row, P pairs, G groups (experts), E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from workers.expert.slots import NO_SLOT


class Batched(Protocol):
    """A call that may be computed together with others of the same batch key."""

    @property
    def batch_key(self) -> tuple[int, int]:
        """Layer index, and flags that change what is computed."""
        ...


CallT = TypeVar("CallT", bound=Batched)


@dataclass(slots=True, eq=False)
class PairGroups:
    """Pairs sorted by expert, and by row within one; `pairs_P` counts row * K + k."""

    pairs_P: NDArray[np.int64]
    rows_P: NDArray[np.int64]
    slots: list[int]
    offsets: list[int]


def into_batches(calls: Sequence[CallT]) -> list[list[CallT]]:
    """Group calls by batch key; batches in the order in which their first call came."""
    batches: dict[tuple[int, int], list[CallT]] = {}
    for call in calls:
        batches.setdefault(call.batch_key, []).append(call)
    return list(batches.values())


def group_by_expert(ids_RK: NDArray[np.int32], slot_E: NDArray[np.int64]) -> PairGroups:
    """Sort the pairs whose experts are here by expert.

    Args:
        ids_RK: Expert ids, -1 for none; ids outside the table count as not here.
        slot_E: Slot of each expert of the layer, -1 where it is not here.
    """
    ids_P = ids_RK.ravel()
    known = (ids_P >= 0) & (ids_P < len(slot_E))
    slot_P = np.where(known, slot_E[np.where(known, ids_P, 0)], NO_SLOT)
    here = np.flatnonzero(slot_P >= 0)
    pairs_P = here[np.argsort(ids_P[here], kind="stable")]
    slot_P = slot_P[pairs_P]
    first_G = np.flatnonzero(np.diff(slot_P, prepend=NO_SLOT))
    return PairGroups(
        pairs_P=pairs_P,
        rows_P=pairs_P // ids_RK.shape[1],
        slots=slot_P[first_G].tolist(),
        offsets=[*first_G.tolist(), len(pairs_P)],
    )


def masks_of(groups: PairGroups, num_rows: int, top_k: int) -> NDArray[np.uint32]:
    """Return, per row, the mask of the experts that are among the pairs."""
    named_RK = np.zeros((num_rows, top_k), dtype=bool)
    named_RK.reshape(-1)[groups.pairs_P] = True
    return named_RK.dot(np.left_shift(np.uint32(1), np.arange(top_k, dtype=np.uint32)))
