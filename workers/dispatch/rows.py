"""How rows get into request frames, and partial sums out of reply frames.

Shape legend: T rows of a layer, R rows of a message, D hidden, K experts a row, P reply rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.dispatch.header import ReplyFrame, RequestFrame
from workers.dispatch.link_set import OpenLink
from workers.dispatch.recovery import Attempt
from workers.dispatch.row_pairs import Pairs
from workers.errors import DispatchError


class StagedReply:
    """An accepted reply that stays in its frame until the layer is complete."""

    def __init__(self, opened: OpenLink, buffer: int, frame: ReplyFrame, num_rows: int) -> None:
        self.values_PD, self.masks_P, self.rows_P = frame.rows(num_rows)
        self._opened = opened
        self._buffer = buffer
        self._frame: ReplyFrame | None = frame

    def release(self) -> None:
        """Give the frame and the buffer of its call back to the link."""
        if self._frame is not None:
            self._opened.release(self._buffer, self._frame)
            self._frame = None

    def detach(self, opened: OpenLink) -> None:
        """Move out of the frame if it belongs to a link whose buffers have run out."""
        if self._opened is opened and self._frame is not None:
            self.values_PD = self.values_PD.clone()
            self.rows_P = self.rows_P.copy()
            self.masks_P = self.masks_P.copy()
            self.release()


def pack_rows(
    frame: RequestFrame, pairs: Pairs, x_TD: Tensor, weights_TK: NDArray[np.float32]
) -> None:
    """Write the rows of some pairs, with masks, ids and weights, into a frame."""
    values_RH, masks_R, ids_RK, weights_RK = frame.rows(len(pairs.masks_R))
    masks_R[:] = pairs.masks_R
    ids_RK[:] = pairs.ids_RK
    if pairs.rows_R is None:
        weights_RK[:] = weights_TK
        values_RH.copy_(x_TD, non_blocking=True)
    else:
        weights_RK[:] = weights_TK[pairs.rows_R]
        rows = torch.from_numpy(pairs.rows_R)
        if x_TD.is_cuda:
            rows = rows.to(x_TD.device)
        values_RH.copy_(x_TD.index_select(0, rows), non_blocking=True)
    if x_TD.is_cuda and not values_RH.is_cuda:
        torch.cuda.current_stream(x_TD.device).synchronize()  # the copy to pinned memory


def summed_masks(reply: StagedReply, pairs: Pairs, *, row_per_expert: bool) -> NDArray[np.uint32]:
    """Return, per row of the request, which of its experts a reply sums.

    Raises DispatchError when the reply names rows that were not sent, or a pair twice.
    """
    num_sent, num_rows = len(pairs.masks_R), len(reply.masks_P)
    if not row_per_expert:
        if num_rows != num_sent:
            raise DispatchError(f"a reply of {num_rows} rows to {num_sent}")
        return reply.masks_P
    rows_P = reply.rows_P
    if num_rows and not 0 <= rows_P.min() <= rows_P.max() < num_sent:
        raise DispatchError("a reply names rows that were not sent")
    summed_R = np.zeros(num_sent, dtype=np.uint32)
    np.bitwise_or.at(summed_R, rows_P, reply.masks_P)
    if np.bitwise_count(summed_R).sum() != num_rows:
        raise DispatchError("a reply names a pair of row and expert twice")
    return summed_R


def sum_partials(attempts: Sequence[Attempt], x_TD: Tensor) -> Tensor:
    """Add pre-summed replies in the order of the attempts; returns y_TD like `x_TD`."""
    y_TD: Tensor | None = None
    is_frame = False
    for attempt in attempts:
        values_PD: Tensor = attempt.payload.values_PD
        if x_TD.is_cuda:
            values_PD = values_PD.to(x_TD.device)
        if attempt.pairs.rows_R is None:
            y_TD, is_frame = (values_PD, True) if y_TD is None else (y_TD + values_PD, False)
        else:
            rows_R = torch.from_numpy(attempt.pairs.rows_R).to(x_TD.device)
            if y_TD is None:
                y_TD = values_PD.new_zeros(x_TD.shape)
            elif is_frame:
                y_TD, is_frame = y_TD.clone(), False
            y_TD.index_add_(0, rows_R, values_PD)  # in place: a copy for each of many costs more
    if y_TD is None:
        return torch.zeros_like(x_TD)
    return y_TD.to(x_TD.dtype, copy=len(attempts) == 1)


def sum_by_expert(attempts: Sequence[Attempt], x_TD: Tensor) -> Tensor:
    """Add replies of one row per (row, expert) in order of expert; returns y_TD like `x_TD`.

    The order depends on nothing but the gate's choice, so the result is the same to the bit
    wherever the experts were computed. Rows of one turn are distinct, so it holds on any device.
    """
    y_TD = torch.zeros_like(x_TD)
    if not attempts:
        return y_TD
    rows, experts = [], []
    for attempt in attempts:
        staged, pairs = attempt.payload, attempt.pairs
        rows.append(staged.rows_P if pairs.rows_R is None else pairs.rows_R[staged.rows_P])
        experts.append(pairs.ids_RK[staged.rows_P, np.log2(staged.masks_P).astype(np.int64)])
    rows_P, experts_P = np.concatenate(rows), np.concatenate(experts)
    values_PD = torch.cat([a.payload.values_PD for a in attempts]).to(x_TD.device, x_TD.dtype)
    order_P = np.lexsort((experts_P, rows_P))
    counts_T = np.bincount(rows_P, minlength=len(x_TD))
    turn_P = np.arange(len(rows_P)) - np.repeat(np.cumsum(counts_T) - counts_T, counts_T)
    for turn in range(counts_T.max(initial=0)):
        chosen = order_P[turn_P == turn]
        at = torch.from_numpy(rows_P[chosen].astype(np.int64)).to(x_TD.device)
        y_TD.index_add_(0, at, values_PD[torch.from_numpy(chosen).to(x_TD.device)])
    return y_TD
