"""Draws from the distributions of rows of logits, filtered by min-p, top-k and top-p.

Filters cut in order of probability, ties by token id. The random number then inverts the cumulative
distribution of what passes, in order of token id: so a near-tie of two tokens does not change which
one a number selects, as it would in order of probability. Sums run along a row, one token after the
other, so that a row's result does not depend on the rows beside it.

Shape legend: R rows, V vocabulary, N candidates (the likeliest tokens, likeliest first).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.types import Sampling

NUM_CANDIDATES = 256  # of a row; rows that need more are sorted whole

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token; the margins, in probability, are those of `sampler.Choice`."""

    token_id: int
    margin: float = math.inf
    filter_margin: float = math.inf


def draw(
    logits_RV: Tensor,
    samplings: Sequence[Sampling],
    uniforms: Sequence[float],
    emitted: Sequence[int] | None = None,
) -> list[Draw]:
    """Draw one token for each row.

    Args:
        logits_RV: float32, with a finite logit in each row.
        samplings: Temperature, above 0, and filters of each row.
        uniforms: The random number of each row, in [0, 1).
        emitted: With the token that each row had emitted, the margins are worked out too.
    """
    vocab_size = logits_RV.shape[1]
    drawn: dict[int, Draw] = {}
    needed = {row: _num_candidates(s, vocab_size) for row, s in enumerate(samplings)}
    filtered = [row for row, count in needed.items() if count]
    if filtered:
        num_candidates = max(needed.values())
        few = _Rows(logits_RV, filtered, samplings, *likeliest(logits_RV[filtered], num_candidates))
        drawn.update(few.draw(uniforms, emitted))
    for row in range(len(samplings)):
        if row in drawn:
            continue
        values_V: Logits = logits_RV[row].cpu().numpy()
        if needed[row]:
            ids_V = (-values_V).argsort(kind="stable")
            whole = _Rows(logits_RV, [row], samplings, ids_V[None], values_V[ids_V][None])
            drawn.update(whole.draw(uniforms, emitted))
        else:
            forced = None if emitted is None else emitted[row]
            drawn[row] = _draw_unfiltered(values_V, samplings[row], uniforms[row], forced)
    return [drawn[row] for row in range(len(samplings))]


def likeliest(logits_RV: Tensor, num_candidates: int) -> tuple[Ids, Logits]:
    """Return ids_RN and logits_RN of the largest logits of each row, ties by token id.

    Of several that tie with the last one, any may be among them.
    """
    values, indices = logits_RV.topk(num_candidates, dim=-1)
    ids_RN: Ids = indices.cpu().numpy()
    values_RN: Logits = values.cpu().numpy()
    order_RN = np.lexsort((ids_RN, -values_RN), axis=-1)
    return np.take_along_axis(ids_RN, order_RN, -1), np.take_along_axis(values_RN, order_RN, -1)


def _num_candidates(sampling: Sampling, vocab_size: int) -> int:
    """Return how many candidates usually decide a draw; 0 when no filter needs any."""
    if 0 < sampling.top_k < vocab_size:
        return min(sampling.top_k + 1, NUM_CANDIDATES, vocab_size)
    is_filtered = sampling.top_p < 1.0 or sampling.min_p > 0.0
    return min(NUM_CANDIDATES, vocab_size) if is_filtered else 0


class _Rows:
    """Some rows of a batch, by their candidates."""

    def __init__(
        self,
        logits_RV: Tensor,
        rows: Sequence[int],
        samplings: Sequence[Sampling],
        ids_RN: Ids,
        values_RN: Logits,
    ) -> None:
        self._logits_RV = logits_RV
        self._rows = rows
        self._samplings = [samplings[row] for row in rows]
        self._ids_RN = ids_RN
        self._values_RN = values_RN
        self._vocab_size = logits_RV.shape[1]
        self._temperature_R1 = np.array([[s.temperature] for s in self._samplings])
        self._min_p_R1 = np.array([[s.min_p] for s in self._samplings])
        self._top_k_R1 = np.array([[s.top_k or self._vocab_size] for s in self._samplings])
        self._top_p_R1 = np.array([[s.top_p] for s in self._samplings])
        self._weights_RN = self._weights(values_RN)
        self._passes_RN = (self._weights_RN >= self._min_p_R1) & (
            np.arange(ids_RN.shape[1]) < self._top_k_R1
        )
        self._total_R = np.where(self._passes_RN, self._weights_RN, 0.0).cumsum(axis=-1)[:, -1]
        self._before_RN = np.zeros_like(self._weights_RN)  # the probability of likelier ones

    def draw(self, uniforms: Sequence[float], emitted: Sequence[int] | None) -> dict[int, Draw]:
        """Return the draws of the rows that the candidates decide, by row."""
        undecided_R = self._cut_top_p()
        ids_RN = np.where(self._passes_RN, self._ids_RN, self._vocab_size)
        order_RN = ids_RN.argsort(axis=-1)
        ids_RN = np.take_along_axis(ids_RN, order_RN, -1)
        weights_RN = np.where(self._passes_RN, self._weights_RN, 0.0)
        ends_RN = np.take_along_axis(weights_RN, order_RN, -1).cumsum(axis=-1)
        uniform_R1 = np.array([[uniforms[row]] for row in self._rows])
        place_R = (ends_RN <= uniform_R1 * ends_RN[:, -1:]).sum(axis=-1)
        # Rounding may lift the product to the very end.
        place_R = np.minimum(place_R, self._passes_RN.sum(axis=-1) - 1)
        draws = {}
        for i, row in enumerate(self._rows):
            if undecided_R[i]:
                continue
            token_id = int(ids_RN[i, place_R[i]])
            draws[row] = Draw(token_id)
            if emitted is not None:
                count = int(self._passes_RN[i].sum())
                kept_N, ends_N = ids_RN[i, :count], ends_RN[i, :count] / ends_RN[i, -1]
                margin = _margin(kept_N, ends_N, uniforms[row], emitted[row], int(place_R[i]))
                draws[row] = Draw(token_id, margin, self._filter_margin(i))
        return draws

    def _cut_top_p(self) -> Flags:
        """Apply the last filter; return which rows further tokens might change."""
        is_partial = self._ids_RN.shape[1] < self._vocab_size
        undecided_R = np.zeros(len(self._rows), dtype=np.bool_)
        if is_partial:
            for i in np.flatnonzero(self._passes_RN[:, -1]).tolist():
                sampling = self._samplings[i]
                undecided_R[i] = sampling.min_p > 0.0 or 0 < sampling.top_k < self._vocab_size
                if not undecided_R[i]:
                    self._total_R[i] = self._whole_total(i)
        sums_RN = self._weights_RN.cumsum(axis=-1)
        self._before_RN[:, 1:] = sums_RN[:, :-1] / self._total_R[:, None]
        self._passes_RN &= (self._before_RN < self._top_p_R1) | (self._top_p_R1 >= 1.0)
        self._passes_RN[:, 0] = True
        if is_partial:  # what was cut may also tie with what is not even here
            last_R = self._passes_RN.sum(axis=-1) - 1
            values_R = np.take_along_axis(self._values_RN, last_R[:, None], -1)[:, 0]
            undecided_R |= values_R == self._values_RN[:, -1]
        return undecided_R

    def _whole_total(self, i: int) -> float:
        """Return the weight of the whole vocabulary."""
        row: Logits = self._logits_RV[self._rows[i]].cpu().numpy()
        shifted_V = row.astype(np.float64) - float(self._values_RN[i, 0])
        return float(np.exp(shifted_V / self._temperature_R1[i]).sum())

    def _weights(self, values_RN: Logits) -> Floats:
        """Return the probabilities at the rows' temperatures, relative to the likeliest token's."""
        shifted_RN = values_RN.astype(np.float64) - values_RN.max(axis=-1, keepdims=True)
        weights_RN: Floats = np.exp(shifted_RN / self._temperature_R1)
        return weights_RN

    def _filter_margin(self, i: int) -> float:
        """Return how close the filters of one row cut."""
        sampling, weights_N = self._samplings[i], self._weights_RN[i]
        margins = [math.inf]
        if sampling.min_p > 0.0:
            margins.append(float(np.abs(weights_N - sampling.min_p).min()))
        if 0 < sampling.top_k < len(weights_N):
            margins.append(float(weights_N[sampling.top_k - 1] - weights_N[sampling.top_k]))
        if sampling.top_p < 1.0:
            margins.append(float(np.abs(self._before_RN[i] - sampling.top_p).min()))
        return min(margins)


def _draw_unfiltered(
    values_V: Logits, sampling: Sampling, uniform: float, emitted: int | None
) -> Draw:
    shifted_V = values_V.astype(np.float64) - values_V.max()
    ends_V: Floats = np.exp(shifted_V / sampling.temperature).cumsum()
    place = int(ends_V.searchsorted(uniform * ends_V[-1], side="right"))
    place = min(place, len(ends_V) - 1)  # rounding may lift the product to the very end
    if emitted is None:
        return Draw(place)
    margin = _margin(np.arange(len(ends_V)), ends_V / ends_V[-1], uniform, emitted, place)
    return Draw(place, margin)


def _margin(kept_N: Ids, ends_N: Floats, uniform: float, emitted: int, place: int) -> float:
    """Return how far the number is from selecting another token, or the emitted one instead."""
    starts_N = np.concatenate(([0.0], ends_N[:-1]))
    there = int(kept_N.searchsorted(emitted))
    if there == place and kept_N[place] == emitted:
        below = uniform - starts_N[place] if place > 0 else math.inf
        above = ends_N[place] - uniform if place < len(ends_N) - 1 else math.inf
        return float(min(below, above))
    if there == len(kept_N) or kept_N[there] != emitted:
        return math.inf  # a filter does not pass it
    return float(max(starts_N[there] - uniform, uniform - ends_N[there]))
