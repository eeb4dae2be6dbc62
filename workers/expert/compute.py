"""What an expert worker computes for the calls of one batch, and the replies it writes.

Shape legend: R rows of all calls of the batch, D hidden, K experts a row, P pairs, E experts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.dispatch.header import Flag, Header, Kind, ReplyFrame
from workers.dispatch.pairs import sum_pairs
from workers.dispatch.plan import BIT_K
from workers.expert.batching import PairGroups, group_by_expert, masks_of
from workers.expert.served_link import Call
from workers.model.experts import ExpertShard

_SMALL_PRODUCT = 2048


class Answer(NamedTuple):
    """A call and its reply, ready to be sent."""

    call: Call
    frame: ReplyFrame
    header: Header

    @property
    def is_stale(self) -> bool:
        """Whether experts of the call were not here."""
        return self.header.kind == Kind.STALE


class Batch(NamedTuple):
    """What was computed for some calls: their answers, and how many (row, expert) pairs."""

    answers: list[Answer]
    num_pairs: int


def compute_batch(
    calls: Sequence[Call], shard: ExpertShard, slot_F: NDArray[np.int64], device: torch.device
) -> Batch:
    """Compute the pairs of some calls of one layer and write their replies.

    `slot_F` is the layer's row of `Lease.slots_LF`. A reply is STALE when some of its experts are
    not here; their pairs are then left out.
    """
    x_RD, ids_RK, weights_RK = _gather(calls)
    groups = group_by_expert(ids_RK, slot_F)
    num_pairs = len(groups.pairs_P)
    x_RD = x_RD if device.type == "cpu" else x_RD.to(device)
    y_PD = shard.forward(x_RD, _to(device, groups.rows_P), groups.slots, groups.offsets)
    weights_P = weights_RK.reshape(-1)[groups.pairs_P]
    if calls[0].header.flags & Flag.ROW_PER_EXPERT:
        weighted_PD = y_PD * _to(device, weights_P)[:, None].to(y_PD.dtype)
        return Batch(_write_by_expert(calls, weighted_PD, ids_RK, groups), num_pairs)
    y_RD = _weighted_sum(y_PD, weights_P, groups.rows_P, len(ids_RK))
    whole = num_pairs == np.count_nonzero(ids_RK >= 0)
    summed_R = None if whole else masks_of(groups, *ids_RK.shape)
    return Batch(_write_sums(calls, y_RD, summed_R), num_pairs)


def _weighted_sum(
    y_PD: Tensor, weights_P: NDArray[np.float32], rows_P: NDArray[np.int64], num_rows: int
) -> Tensor:
    """Sum each row's pairs; for a few rows as one product, which takes fewer calls."""
    num_pairs = len(rows_P)
    device = y_PD.device
    if num_rows * num_pairs > _SMALL_PRODUCT:
        return sum_pairs(y_PD, _to(device, weights_P), _to(device, rows_P), num_rows)
    weights_RP = weights_P[None]
    if num_rows != 1:
        weights_RP = np.zeros((num_rows, num_pairs), dtype=np.float32)
        weights_RP[rows_P, np.arange(num_pairs)] = weights_P
    weights = _to(device, weights_RP)
    return torch.mm(weights if y_PD.dtype == torch.float32 else weights.to(y_PD.dtype), y_PD)


def _to(device: torch.device, array: NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device)


def _gather(
    calls: Sequence[Call],
) -> tuple[Tensor, NDArray[np.int32], NDArray[np.float32]]:
    """Return the rows of all calls, with their ids and weights; views for a single call."""
    parts = [call.frame.rows(call.header.num_rows) for call in calls]
    if len(parts) == 1:
        return parts[0].values_RH, parts[0].ids_RK, parts[0].weights_RK
    return (
        torch.cat([part.values_RH for part in parts]),
        np.concatenate([part.ids_RK for part in parts]),
        np.concatenate([part.weights_RK for part in parts]),
    )


def _write_sums(
    calls: Sequence[Call], y_RD: Tensor, summed_R: NDArray[np.uint32] | None
) -> list[Answer]:
    """One reply row per row: the sum over those of its experts that are here.

    `summed_R` is None when they all are: the reply then names what the request asked for.
    """
    answers = []
    start = 0
    for call in calls:
        num_rows = call.header.num_rows
        own = slice(start, start + num_rows)
        start += num_rows
        frame = call.served.reply_frame(call.header.buffer)
        reply = frame.rows(num_rows)
        reply.values_RH.copy_(y_RD if len(calls) == 1 else y_RD[own])
        asked_R = call.frame.rows(num_rows).masks_R
        reply.masks_R[:] = asked_R if summed_R is None else summed_R[own]
        stale = summed_R is not None and bool((reply.masks_R != asked_R).any())
        answers.append(_answer(call, frame, num_rows, stale=stale))
    return answers


def _write_by_expert(
    calls: Sequence[Call], weighted_PD: Tensor, ids_RK: NDArray[np.int32], groups: PairGroups
) -> list[Answer]:
    """One reply row per (row, expert) that is here."""
    answers = []
    top_k = ids_RK.shape[1]
    start = 0
    for call in calls:
        stop = start + call.header.num_rows
        own_P = np.flatnonzero((groups.rows_P >= start) & (groups.rows_P < stop))
        frame = call.served.reply_frame(call.header.buffer)
        reply = frame.rows(len(own_P))
        reply.values_RH.copy_(weighted_PD[_to(weighted_PD.device, own_P)])
        reply.rows_R[:] = groups.rows_P[own_P] - start
        reply.masks_R[:] = BIT_K[groups.pairs_P[own_P] % top_k]
        asked = np.count_nonzero(ids_RK[start:stop] >= 0)
        answers.append(_answer(call, frame, len(own_P), stale=bool(len(own_P) < asked)))
        start = stop
    return answers


def _answer(call: Call, frame: ReplyFrame, num_rows: int, *, stale: bool) -> Answer:
    kind = Kind.STALE if stale else Kind.REPLY
    return Answer(call, frame, call.header._replace(kind=kind, num_rows=num_rows))
