"""Sums of replies: right for any split of the rows, and no frame is written."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from workers.dispatch.rows import sum_partials


def reply(rows, values):
    """An answered attempt of some rows, None for all of them."""
    pairs = SimpleNamespace(rows_R=None if rows is None else np.array(rows))
    return SimpleNamespace(pairs=pairs, payload=SimpleNamespace(values_PD=torch.tensor(values)))


@pytest.mark.parametrize(
    "splits",
    [
        [None],
        [None, None],
        [None, [0, 2], [1]],
        [[2], None, [0]],
        [[0], [1], [2], [0, 1, 2]],
    ],
)
def test_partial_sums_are_added_and_frames_are_left_as_they_are(splits):
    draw = np.random.default_rng(5)
    attempts, due = [], np.zeros((3, 4), dtype=np.float32)
    for rows in splits:
        values = draw.integers(1, 100, (3 if rows is None else len(rows), 4)).astype(np.float32)
        due[slice(None) if rows is None else rows] += values
        attempts.append(reply(rows, values.tolist()))
    frames = [attempt.payload.values_PD.clone() for attempt in attempts]

    y_TD = sum_partials(attempts, torch.zeros(3, 4))
    assert y_TD.tolist() == due.tolist()
    y_TD.fill_(-1.0)
    for attempt, before in zip(attempts, frames, strict=True):
        assert torch.equal(attempt.payload.values_PD, before)


def test_no_reply_sums_to_nothing():
    assert sum_partials([], torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2
