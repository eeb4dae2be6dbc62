"""Which pairs of which calls are computed together: pure.

Everything that waits is taken at once, calls of one layer together, whatever gateway they are
from, and their pairs are grouped by expert. Shape legend: R rows of all calls of a layer, K experts
a row, P pairs, F experts and a last column for none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from workers.dispatch.plan import BIT_K
from workers.errors import DispatchError


class Batched(Protocol):
    """A call that may be computed together with others of the same batch key."""

    @property
    def batch_key(self) -> tuple[int, int]:
        """Layer index, and flags that change what is computed."""
        ...


CallT = TypeVar("CallT", bound=Batched)


@dataclass(slots=True, eq=False)
class PairGroups:
    """Pairs sorted by slot, and by row within one; `pairs_P` counts row * K + k."""

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


def group_by_expert(ids_RK: NDArray[np.int32], slot_F: NDArray[np.int64]) -> PairGroups:
    """Sort the pairs whose experts are here by slot.

    Args:
        ids_RK: Expert ids, -1 for none.
        slot_F: A layer's row of `Lease.slots_LF`.

    Raises DispatchError when an id is beyond the experts of the model.
    """
    try:
        slot_P = slot_F.take(ids_RK.ravel())
    except IndexError as error:
        raise DispatchError(f"expert {ids_RK.max()} of {len(slot_F) - 1}") from error
    pairs_P = slot_P.argsort(kind="stable")
    slot_P = slot_P[pairs_P]
    first_here = int(slot_P.searchsorted(0))
    if first_here:
        pairs_P, slot_P = pairs_P[first_here:], slot_P[first_here:]
    ends = (slot_P[1:] != slot_P[:-1]).nonzero()[0]
    return PairGroups(
        pairs_P=pairs_P,
        rows_P=pairs_P // ids_RK.shape[1],
        slots=slot_P.take(ends).tolist() + slot_P[-1:].tolist(),
        offsets=[0] * (len(slot_P) > 0) + [end + 1 for end in ends.tolist()] + [len(slot_P)],
    )


def masks_of(groups: PairGroups, num_rows: int, top_k: int) -> NDArray[np.uint32]:
    """Return, per row, the mask of the experts that are among the pairs."""
    named_RK = np.zeros((num_rows, top_k), dtype=bool)
    named_RK.reshape(-1)[groups.pairs_P] = True
    masks_R: NDArray[np.uint32] = named_RK.dot(BIT_K[:top_k])
    return masks_R
