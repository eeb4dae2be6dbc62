"""The (row, expert) pairs of a dispatch: sorted by expert on the way out, summed on the way back.

Shape legend: T rows, K experts a token, P pairs, D hidden.
"""

from itertools import accumulate

import torch
from torch import Tensor


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
