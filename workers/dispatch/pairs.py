"""The (row, expert) pairs of a dispatch: sorted by expert on the way out, summed on the way back.

Shape legend: T rows, K experts a token, P pairs, D hidden; R rows of one message.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

    def layer_rows(self) -> list[int]:
        """Return the rows of the layer that they are of, in order."""
        return list(range(len(self.masks_R))) if self.rows_R is None else self.rows_R.tolist()

    def within(self, outer: "Pairs") -> "Pairs":
        """Return these pairs, whose rows count the rows of `outer`, in rows of the layer."""
        if outer.rows_R is None:
            return self
        rows_R = outer.rows_R if self.rows_R is None else outer.rows_R[self.rows_R]
        return Pairs(rows_R, self.ids_RK, self.masks_R)


def group_pairs(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, list[int], list[int]]:
    """Sort the pairs of some rows by expert; pairs of one expert stay in the order of their rows.

    Returns:
        order_P: int64 index of each sorted pair in the flattened ids; its row is index // K.
        experts: The experts that are chosen at all, ascending.
        offsets: Expert g has the sorted pairs offsets[g]:offsets[g + 1].
    """
    ids_P = expert_ids_TK.flatten()
    counts = torch.bincount(ids_P, minlength=num_experts).tolist()
    experts = [expert for expert, count in enumerate(counts) if count]
    offsets = [0, *accumulate(counts[expert] for expert in experts)]
    return ids_P.argsort(stable=True), experts, offsets


def sum_pairs(y_PD: Tensor, weights_P: Tensor, rows_P: Tensor, num_rows: int) -> Tensor:
    """Return y_RD: the weighted sum of each row's pairs, added one by one in the order of pairs."""
    weighted = y_PD * weights_P[:, None].to(y_PD.dtype)
    return y_PD.new_zeros(num_rows, y_PD.shape[1]).index_add_(0, rows_P, weighted)
