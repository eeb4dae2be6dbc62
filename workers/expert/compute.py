"""What an expert worker computes for the calls of one batch, and the replies it writes.

Shape legend: R rows of all calls of the batch, D hidden, K experts a row, P pairs, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.dispatch.header import Flag, Header, Kind, ReplyFrame
from workers.dispatch.pairs import sum_pairs
from workers.expert.batching import PairGroups, group_by_expert, masks_of
from workers.expert.served_link import Call
from workers.model.experts import ExpertShard


class Answer(NamedTuple):
    """A call and its reply, ready to be sent."""

    call: Call
    frame: ReplyFrame
    header: Header
    num_pairs: int

    @property
    def is_stale(self) -> bool:
        """Whether experts of the call were not here."""
        return self.header.kind == Kind.STALE


def compute_batch(
    calls: Sequence[Call], shard: ExpertShard, slot_E: NDArray[np.int64], device: torch.device
) -> list[Answer]:
    """Compute the pairs of some calls of one layer and write their replies.

    A reply is STALE when some of its experts are not here; their pairs are then left out.
    """
    x_RD, ids_RK, weights_RK = _gather(calls)
    num_rows, top_k = ids_RK.shape
    groups = group_by_expert(ids_RK, slot_E)
    rows_P = torch.from_numpy(groups.rows_P).to(device)
    weights_P = torch.from_numpy(weights_RK.reshape(-1)[groups.pairs_P]).to(device)
    y_PD = shard.forward(x_RD.to(device), rows_P, groups.slots, groups.offsets)
    if calls[0].header.flags & Flag.ROW_PER_EXPERT:
        weighted_PD = y_PD * weights_P[:, None].to(y_PD.dtype)
        return _write_by_expert(calls, weighted_PD, ids_RK, groups)
    y_RD = sum_pairs(y_PD, weights_P, rows_P, num_rows)
    return _write_sums(calls, y_RD, ids_RK, masks_of(groups, num_rows, top_k))


def _gather(
    calls: Sequence[Call],
) -> tuple[Tensor, NDArray[np.int32], NDArray[np.float32]]:
    """Return the rows of all calls, with their ids and weights; views for a single call."""
    parts = [(call.frame, call.header.num_rows) for call in calls]
    if len(parts) == 1:
        frame, n = parts[0]
        return frame.values_CH[:n], frame.ids_CK[:n], frame.weights_CK[:n]
    return (
        torch.cat([frame.values_CH[:n] for frame, n in parts]),
        np.concatenate([frame.ids_CK[:n] for frame, n in parts]),
        np.concatenate([frame.weights_CK[:n] for frame, n in parts]),
    )


def _write_sums(
    calls: Sequence[Call], y_RD: Tensor, ids_RK: NDArray[np.int32], masks_R: NDArray[np.uint32]
) -> list[Answer]:
    """One reply row per row: the sum over those of its experts that are here."""
    answers = []
    start = 0
    for call in calls:
        num_rows = call.header.num_rows
        own = slice(start, start + num_rows)
        start += num_rows
        frame = call.served.reply_frame(call.header.buffer)
        frame.values_CH[:num_rows].copy_(y_RD[own])
        frame.rows_C[:num_rows] = np.arange(num_rows)
        frame.masks_C[:num_rows] = masks_R[own]
        num_pairs = int(np.bitwise_count(masks_R[own]).sum())
        answers.append(_answer(call, frame, num_rows, num_pairs, ids_RK[own]))
    return answers


def _write_by_expert(
    calls: Sequence[Call], weighted_PD: Tensor, ids_RK: NDArray[np.int32], groups: PairGroups
) -> list[Answer]:
    """One reply row per (row, expert) that is here, in order of expert."""
    answers = []
    top_k = ids_RK.shape[1]
    start = 0
    for call in calls:
        stop = start + call.header.num_rows
        own_P = np.flatnonzero((groups.rows_P >= start) & (groups.rows_P < stop))
        count = len(own_P)
        frame = call.served.reply_frame(call.header.buffer)
        frame.values_CH[:count].copy_(weighted_PD[torch.from_numpy(own_P).to(weighted_PD.device)])
        frame.rows_C[:count] = groups.rows_P[own_P] - start
        frame.masks_C[:count] = np.left_shift(
            np.uint32(1), (groups.pairs_P[own_P] % top_k).astype(np.uint32)
        )
        answers.append(_answer(call, frame, count, count, ids_RK[start:stop]))
        start = stop
    return answers


def _answer(
    call: Call, frame: ReplyFrame, num_rows: int, num_pairs: int, ids_RK: NDArray[np.int32]
) -> Answer:
    whole = num_pairs == np.count_nonzero(ids_RK >= 0)
    kind = Kind.REPLY if whole else Kind.STALE
    header = call.header._replace(kind=kind, num_rows=num_rows, payload_checksum=0)
    return Answer(call, frame, header, num_pairs)
