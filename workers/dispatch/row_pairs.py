"""Some of the pairs (row, expert) of one layer: what waits, what a message asks for. Pure.

Shape legend: R rows, T rows of the layer, K experts a row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_EXPERT = -1


@dataclass(slots=True, eq=False)
class Pairs:
    """Pairs (row, expert) of one layer.

    `rows_R` indexes the rows of the layer, None for all of them in order; `ids_RK` holds -1 where
    a row's expert is not among the pairs, and bit k of `masks_R` says the same of expert k.
    """

    rows_R: NDArray[np.int64] | None
    ids_RK: NDArray[np.int32]
    masks_R: NDArray[np.uint32]

    @classmethod
    def all_of(cls, ids_TK: NDArray[np.int32]) -> "Pairs":
        """Return every pair of a layer's rows."""
        masks_T = np.empty(len(ids_TK), dtype=np.uint32)
        masks_T.fill((1 << ids_TK.shape[1]) - 1)
        return cls(None, ids_TK, masks_T)

    def only(self, masks_R: NDArray[np.uint32]) -> "Pairs":
        """Return the pairs that are in `masks_R`, a part of these."""
        kept = np.flatnonzero(masks_R)
        bits_K = np.left_shift(np.uint32(1), np.arange(self.ids_RK.shape[1], dtype=np.uint32))
        named_RK = (masks_R[kept, None] & bits_K) != 0
        ids_RK = np.where(named_RK, self.ids_RK[kept], NO_EXPERT).astype(np.int32)
        return Pairs(kept if self.rows_R is None else self.rows_R[kept], ids_RK, masks_R[kept])

    def one_row(self, at: int) -> "Pairs":
        """Return the pairs of one of the rows, by its place among them."""
        rows_R = np.array([at]) if self.rows_R is None else self.rows_R[at : at + 1]
        return Pairs(rows_R, self.ids_RK[at : at + 1], self.masks_R[at : at + 1])

    @property
    def num_experts(self) -> int:
        """How many distinct experts are named."""
        return len(np.unique(self.ids_RK[self.ids_RK != NO_EXPERT]))

    def layer_rows(self) -> list[int]:
        """Return the rows of the layer that they are of, in order."""
        return list(range(len(self.masks_R))) if self.rows_R is None else self.rows_R.tolist()

    def within(self, outer: "Pairs") -> "Pairs":
        """Return these pairs, whose rows count the rows of `outer`, in rows of the layer."""
        if outer.rows_R is None:
            return self
        rows_R = outer.rows_R if self.rows_R is None else outer.rows_R[self.rows_R]
        return Pairs(rows_R, self.ids_RK, self.masks_R)
