"""Which rows workers may have ended by: met by several, shown alone by several, and nobody else."""

import numpy as np

from workers.dispatch.row_pairs import Pairs
from workers.dispatch.suspects import MEETINGS, PROOFS, Suspects
from workers.placement import MemberId

W = [MemberId(f"worker-{i}", 1) for i in range(6)]


def pairs_of(rows):
    """One pair of each of some rows of the layer, in order."""
    ids_RK = np.array([[row, -1] for row in rows], dtype=np.int32)
    return Pairs(np.array(rows), ids_RK, np.ones(len(rows), dtype=np.uint32))


def messages(suspects, rows):
    """The messages in which some rows travel, by row, and which are alone."""
    return [(part.layer_rows(), alone) for part, alone in suspects.apart(pairs_of(rows))]


def test_nothing_is_held_against_a_row_until_a_worker_is_lost():
    suspects = Suspects()
    assert not suspects
    assert messages(suspects, [3, 5]) == [([3, 5], False)]


def test_rows_that_met_enough_lost_workers_travel_each_in_a_message_of_its_own():
    suspects = Suspects()
    for worker in W[: MEETINGS - 1]:
        suspects.lost(worker, pairs_of([1, 2, 4]))
    assert messages(suspects, [1, 2, 4]) == [([1, 2, 4], False)]
    suspects.lost(W[4], pairs_of([2, 4]))
    assert messages(suspects, [1, 2, 4]) == [([1], False), ([2], True), ([4], True)]
    assert messages(suspects, [2, 4]) == [([2], True), ([4], True)]


def test_one_worker_is_met_once_however_often_its_link_breaks():
    suspects = Suspects()
    for _ in range(9):
        suspects.lost(W[0], pairs_of([1]))
    for number in range(9):
        suspects.shown(W[0], pairs_of([1]), number, number)
    assert messages(suspects, [1]) == [([1], False)]
    assert not suspects.given_up


def test_a_row_is_given_up_when_it_was_shown_again_and_again():
    suspects = Suspects()
    for number, worker in enumerate(W[:PROOFS]):
        assert not suspects.given_up
        suspects.shown(worker, pairs_of([7]), number, number)
    assert suspects.given_up == {7}


def test_workers_that_end_together_show_a_row_once():
    suspects = Suspects()
    for number, worker in enumerate(W[:3], start=1):  # all three were on their way at the first
        suspects.shown(worker, pairs_of([7]), number, 3)
    assert not suspects.given_up
    suspects.shown(W[3], pairs_of([7]), 4, 4)
    assert suspects.given_up == {7}


def test_a_row_that_is_only_ever_with_others_is_never_given_up():
    suspects = Suspects()
    for worker in W:
        suspects.lost(worker, pairs_of([1, 2]))
    assert not suspects.given_up
