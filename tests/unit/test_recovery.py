"""Replies, losses and resends of one layer: whatever happens, every pair is summed once."""

import random

import numpy as np
import pytest

from workers.dispatch.recovery import AnswerTimes, Attempt, HedgeBudget, LayerCall
from workers.dispatch.row_pairs import Pairs
from workers.placement import MemberId

W = [MemberId(f"worker-{i}", 1) for i in range(6)]


def all_pairs(ids):
    """Pairs of all rows of `ids`."""
    ids = np.array(ids, dtype=np.int32)
    bits = np.left_shift(np.uint32(1), np.arange(ids.shape[1], dtype=np.uint32))
    return Pairs(None, ids, (ids >= 0).dot(bits))


def named(pairs):
    """The (row, k) that some pairs name."""
    rows = range(len(pairs.masks_R)) if pairs.rows_R is None else pairs.rows_R.tolist()
    return {
        (row, k)
        for row, mask in zip(rows, pairs.masks_R.tolist(), strict=True)
        for k in range(32)
        if mask >> k & 1
    }


def some(rows, ids, masks):
    """Pairs of some rows."""
    rows = None if rows is None else np.array(rows)
    return Pairs(rows, np.array(ids, dtype=np.int32), np.array(masks, dtype=np.uint32))


class Lab:
    """Sends attempts by hand."""

    def __init__(self, ids):
        self.call = LayerCall(0, all_pairs(ids))
        self.num_messages = 0

    def send(self, group, worker, pairs=None, incarnation=1, deadline_s=1.0, rest=None):
        self.num_messages += 1
        waiting = group.waiting
        assert waiting is not None
        attempt = Attempt(
            message_id=self.num_messages,
            worker=worker,
            incarnation=incarnation,
            pairs=waiting if pairs is None else pairs,
            number=group.number,
            sent_s=0.0,
            allowed_s=deadline_s,
            deadline_s=deadline_s,
        )
        self.call.place(group, [attempt], rest)
        return attempt

    def answer(self, attempt, masks=None, worker=None, incarnation=None):
        masks = attempt.pairs.masks_R if masks is None else np.array(masks, dtype=np.uint32)
        return self.call.reply(
            attempt.message_id,
            worker or attempt.worker,
            incarnation or attempt.incarnation,
            masks,
            f"reply to {attempt.message_id}",
        )

    def winners(self):
        return [attempt.payload for attempt in self.call.cover()]

    def need(self):
        (group,) = self.call.needs()
        return group


def test_nothing_to_send_is_complete_at_once():
    lab = Lab(np.zeros((0, 2)))
    lab.call.place(lab.need(), [], None)
    assert lab.call.complete
    assert not lab.winners()


def test_a_call_is_complete_when_all_its_attempts_are_answered():
    lab = Lab([[1, 2]])
    group = lab.need()
    halves = [
        some(None, [[1, -1]], [1]),
        some(None, [[-1, 2]], [2]),
    ]
    first = lab.send(group, W[0], halves[0], rest=halves[1])
    assert not lab.call.complete
    second = lab.send(group, W[1], halves[1])
    assert lab.answer(second)
    assert not lab.call.complete
    assert lab.answer(first)
    assert lab.call.complete
    assert lab.winners() == ["reply to 1", "reply to 2"], "in the order of sending"


def test_a_second_reply_to_one_attempt_is_dropped():
    lab = Lab([[1]])
    attempt = lab.send(lab.need(), W[0])
    assert lab.answer(attempt)
    assert not lab.answer(attempt)


@pytest.mark.parametrize("wrong", [{"worker": W[1]}, {"incarnation": 2}, {"masks": [3]}])
def test_a_reply_of_somebody_else_or_of_too_much_is_dropped(wrong):
    lab = Lab([[1, -1]])
    attempt = lab.send(lab.need(), W[0])
    assert lab.answer(attempt, **wrong) is None
    assert not lab.call.complete
    assert lab.answer(attempt)


@pytest.mark.parametrize("ends", ["the link breaks", "a reply without any sum"])
def test_a_call_may_be_sent_again_any_number_of_times(ends):
    lab = Lab([[1, 2], [3, 4]])
    for _ in range(3000):
        attempt = lab.send(lab.need(), W[0])
        if ends == "the link breaks":
            lab.call.give_up(attempt)
        else:
            assert lab.answer(attempt, [0, 0]) is attempt
        assert not lab.call.outstanding
    assert lab.answer(lab.send(lab.need(), W[1]))
    assert lab.call.complete
    assert lab.winners() == ["reply to 3001"]


def test_what_was_on_a_broken_link_is_waiting_again_and_its_reply_is_late():
    lab = Lab([[1], [2]])
    attempt = lab.send(lab.need(), W[0])
    assert lab.call.link_lost(W[0], 2) == [], "another incarnation"
    assert lab.call.link_lost(W[0], 1) == [attempt]
    assert not lab.answer(attempt)
    again = lab.send(lab.need(), W[1])
    assert again.number == 2
    assert named(again.pairs) == {(0, 0), (1, 0)}
    assert lab.answer(again)
    assert lab.winners() == ["reply to 2"]


def test_what_others_answered_is_kept():
    lab = Lab([[1, 2]])
    group = lab.need()
    left, right = (
        some(None, [[1, -1]], [1]),
        some(None, [[-1, 2]], [2]),
    )
    kept = lab.send(group, W[0], left, rest=right)
    lab.send(group, W[1], right)
    lab.answer(kept)
    lab.call.link_lost(W[1], 1)
    again = lab.send(lab.need(), W[2])
    assert named(again.pairs) == {(0, 1)}
    lab.answer(again)
    assert lab.winners() == ["reply to 1", "reply to 3"]


def test_a_stale_answer_counts_for_what_it_summed():
    lab = Lab([[1, 2], [3, 4]])
    attempt = lab.send(lab.need(), W[0])
    assert lab.answer(attempt, [0b11, 0b10])
    assert not lab.call.complete
    group = lab.need()
    assert named(group.waiting) == {(1, 0)}
    assert group.waiting.ids_RK.tolist() == [[3, -1]]
    lab.answer(lab.send(group, W[1]))
    assert lab.winners() == ["reply to 1", "reply to 2"]


def test_of_a_hedge_and_its_original_the_first_wins_whole():
    lab = Lab([[1]])
    original = lab.send(lab.need(), W[0])
    hedge = lab.send(lab.call.hedge(original), W[1])
    assert lab.answer(hedge)
    assert lab.call.complete
    assert not lab.answer(original), "late"
    assert lab.winners() == ["reply to 2"]

    lab = Lab([[1]])
    original = lab.send(lab.need(), W[0])
    hedge = lab.send(lab.call.hedge(original), W[1])
    assert lab.answer(original)
    assert not lab.answer(hedge)
    assert lab.winners() == ["reply to 1"]


def test_half_a_hedge_is_never_mixed_with_its_original():
    lab = Lab([[1, 2], [1, 2]])
    other = some([1], [[1, 2]], [3])
    whole = lab.need()
    mine = some([0], [[1, 2]], [3])
    original = lab.send(whole, W[0], mine, rest=other)
    lab.send(whole, W[3], other)
    group = lab.call.hedge(original)
    left, right = (
        some([0], [[1, -1]], [1]),
        some([0], [[-1, 2]], [2]),
    )
    half = lab.send(group, W[1], left, rest=right)
    lab.send(group, W[2], right)
    assert lab.answer(half)
    assert lab.answer(original)
    lab.call.reply(2, W[3], 1, np.array([3], dtype=np.uint32), "reply to 2")
    assert lab.call.complete
    assert lab.winners() == ["reply to 1", "reply to 2"]


def test_a_hedge_of_what_was_answered_in_part_is_dropped():
    lab = Lab([[1, 2]])
    original = lab.send(lab.need(), W[0])
    hedge = lab.send(lab.call.hedge(original), W[1])
    assert lab.answer(original, [1])
    assert not lab.answer(hedge), "it holds a pair that is summed already"
    lab.answer(lab.send(lab.need(), W[2]))
    assert lab.winners() == ["reply to 1", "reply to 3"]


def test_a_hedge_that_is_not_sent_yet_is_no_longer_needed_when_its_original_answers():
    lab = Lab([[1, 2]])
    lab.send(lab.need(), W[0], some(None, [[1, -1]], [1]), rest=some(None, [[-1, 2]], [2]))
    second = lab.send(lab.need(), W[1])
    lab.call.hedge(second)
    assert lab.call.needs()
    lab.answer(second)
    assert not lab.call.needs()


def test_a_lost_hedge_is_not_replaced_while_its_original_is_awaited():
    lab = Lab([[1]])
    original = lab.send(lab.need(), W[0])
    lab.send(lab.call.hedge(original), W[1])
    lab.call.link_lost(W[1], 1)
    assert not lab.call.needs()
    lab.call.link_lost(W[0], 1)
    lab.answer(lab.send(lab.need(), W[2]))
    assert lab.winners() == ["reply to 3"]


@pytest.mark.parametrize("ends", ["lost", "stale"])
def test_a_hedge_that_brings_nothing_makes_its_original_overdue_at_once(ends):
    lab = Lab([[1]])
    original = lab.send(lab.need(), W[0], deadline_s=1.0)
    assert lab.call.overdue(1.0) == [original]
    original.deadline_s = 2.0
    hedge = lab.send(lab.call.hedge(original), W[1], deadline_s=2.0)
    assert not lab.call.overdue(1.1)
    if ends == "lost":
        lab.call.link_lost(W[1], 1)
    else:
        assert lab.answer(hedge, [0])

    assert lab.call.overdue(1.1) == [original]
    assert lab.answer(lab.send(lab.call.hedge(original), W[2]))
    assert lab.winners() == ["reply to 3"]


def test_a_lost_original_is_not_replaced_while_its_hedge_is_awaited():
    lab = Lab([[1]])
    original = lab.send(lab.need(), W[0])
    hedge = lab.send(lab.call.hedge(original), W[1])
    lab.call.link_lost(W[0], 1)
    assert not lab.call.needs()
    lab.call.link_lost(W[1], 1)
    lab.answer(lab.send(lab.need(), W[2]))
    assert lab.winners() == ["reply to 3"]
    assert not lab.answer(hedge)


def test_parked_pairs_stay_needed_until_they_are_placed():
    lab = Lab([[1, 2]])
    group = lab.need()
    lab.call.place(group, [], group.waiting)
    assert lab.call.needs() == [group]
    assert lab.call.next_deadline_s() == float("inf")


def test_only_awaited_attempts_are_overdue():
    lab = Lab([[1]])
    original = lab.send(lab.need(), W[0], deadline_s=1.0)
    assert not lab.call.overdue(0.9)
    assert lab.call.overdue(1.0) == [original]
    lab.answer(lab.send(lab.call.hedge(original), W[1], deadline_s=5.0))
    assert not lab.call.overdue(9.0)
    assert lab.call.next_deadline_s() == float("inf")


@pytest.mark.parametrize("first_seed", range(0, 400, 50))
def test_every_pair_is_summed_once_whatever_happens(first_seed):
    for seed in range(first_seed, first_seed + 50):
        run_disturbed_call(seed)


def run_disturbed_call(seed):
    """Random losses, STALE answers, hedges, duplicates and delays, from one seed."""
    draw = random.Random(seed)
    num_rows, top_k, num_experts = draw.randrange(1, 5), draw.randrange(1, 4), 6
    ids = [draw.sample(range(num_experts), top_k) for _ in range(num_rows)]
    lab = Lab(ids)
    incarnation = dict.fromkeys(W, 1)
    messages = []  # attempts whose reply may still come, again and again
    for step in range(2000):
        if lab.call.complete:
            break
        chaos = step < 60
        for group in lab.call.needs():
            waiting = group.waiting
            cut = {w: np.zeros_like(waiting.masks_R) for w in W}
            for at, mask in enumerate(waiting.masks_R.tolist()):
                for k in range(top_k):
                    if mask >> k & 1 and (not chaos or draw.random() < 0.8):
                        cut[draw.choice(W)][at] |= np.uint32(1 << k)
            left = waiting.masks_R.copy()
            attempts = []
            for worker, masks in cut.items():
                left &= ~masks
                if masks.any():
                    lab.num_messages += 1
                    attempts.append(
                        Attempt(
                            message_id=lab.num_messages,
                            worker=worker,
                            incarnation=incarnation[worker],
                            pairs=waiting.only(masks),
                            number=group.number,
                            sent_s=step,
                            allowed_s=9.0,
                            deadline_s=step + draw.randrange(1, 9),
                        )
                    )
            lab.call.place(group, attempts, waiting.only(left) if left.any() else None)
            messages += attempts
        event = draw.random()
        if chaos and event < 0.15:
            worker = draw.choice(W)
            lab.call.link_lost(worker, incarnation[worker])
            incarnation[worker] += 1
        elif chaos and event < 0.3:
            for attempt in lab.call.overdue(step):
                attempt.deadline_s = step + 5
                if not any(not g.dropped for g in attempt.groups):
                    lab.call.hedge(attempt)
        elif messages:
            attempt = draw.choice(messages)
            masks = attempt.pairs.masks_R
            if chaos and draw.random() < 0.3:
                masks = masks & np.uint32(draw.randrange(1 << top_k))
            attempt_before = attempt.payload
            taken = lab.call.reply(
                attempt.message_id,
                attempt.worker,
                attempt.incarnation,
                masks,
                {(r, k) for r, k in named(attempt.pairs.only(masks))},
            )
            if taken is not None:
                assert attempt_before is None, "a reply was taken twice"
                assert attempt.incarnation == incarnation[attempt.worker], "a dead link's reply"
    assert lab.call.complete, seed
    summed = [pair for attempt in lab.call.cover() for pair in attempt.payload]
    assert sorted(summed) == [(r, k) for r in range(num_rows) for k in range(top_k)], seed


def test_only_what_was_sent_has_met_the_worker_that_is_lost():
    lab = Lab([[1], [2]])
    group = lab.need()
    sent = lab.send(group, W[0], some([0], [[1]], [1]), rest=some([1], [[2]], [1]))
    sent.is_sent = True
    queued = lab.send(group, W[0])
    assert lab.call.link_lost(W[0], 1) == [sent, queued]
    assert list(lab.call.suspects._met) == [0]


def test_a_loss_is_proof_only_against_the_call_that_the_worker_began_to_compute_alone():
    lab = Lab([[1], [2]])
    group = lab.need()
    for worker in W[:2]:
        first = lab.send(group, worker, some([0], [[1]], [1]), rest=some([1], [[2]], [1]))
        second = lab.send(group, worker, some([1], [[2]], [1]))
        first.is_sent = second.is_sent = True
        assert not lab.call.suspects.given_up
        lab.call.link_lost(worker, 1, computing=second.message_id)
        group = next(iter(lab.call.needs()[::-1]), None)
    assert lab.call.suspects.given_up == {1}


def test_a_call_is_at_an_end_with_the_first_row_that_is_given_up():
    """Its step is taken again without that row: what else is on its way may only do more harm."""
    lab = Lab([[1], [2], [3]])
    group = lab.need()
    answered = lab.send(group, W[5], some([0], [[1]], [1]), rest=some([1, 2], [[2], [3]], [1, 1]))
    awaited = lab.send(group, W[4], some([1], [[2]], [1]), rest=some([2], [[3]], [1]))
    lab.answer(answered)
    for worker in W[:2]:
        assert not lab.call.complete
        guilty = lab.send(group, worker)
        guilty.is_sent = True
        lab.call.link_lost(worker, 1, computing=guilty.message_id)
        group = next(iter(lab.call.needs()), None)
    assert lab.call.complete
    assert group is None, "nothing of it is sent any more"
    assert not lab.call.awaits(awaited)
    assert lab.answer(awaited) is None
    assert lab.winners() == ["reply to 1"]


def test_a_hedge_that_is_lost_says_nothing_of_rows_that_were_computed_elsewhere():
    lab = Lab([[1], [2]])
    group = lab.need()
    original = lab.send(group, W[0], some([0], [[1]], [1]), rest=some([1], [[2]], [1]))
    lab.send(group, W[2])
    hedge = lab.send(lab.call.hedge(original), W[1])
    hedge.is_sent = True
    lab.answer(original)
    lab.call.link_lost(W[1], 1, computing=hedge.message_id)
    assert not lab.call.suspects


def test_a_deadline_is_learned_by_size_of_call():
    times = AnswerTimes(factor=10, least_s=0.05, first_s=2.0, lately_s={})
    for _ in range(7):
        times.record(8, 0.01)
    assert times.deadline_s(8) == 2.0
    times.record(8, 0.01)
    assert times.deadline_s(8) == pytest.approx(0.1)
    assert times.deadline_s(500) == 2.0
    for _ in range(64):
        times.record(8, 0.0001)
    for _ in range(96):
        times.record(8, 0.0001)
    assert times.deadline_s(8) == 0.05
    for _ in range(32):
        times.record(8, 0.2)
    assert times.deadline_s(8) == pytest.approx(2.0)


def test_a_new_worker_is_judged_by_what_others_take():
    lately_s: dict[int, float] = {}
    old, new = (
        AnswerTimes(factor=10, least_s=0.05, first_s=2.0, lately_s=lately_s) for _ in range(2)
    )
    assert new.deadline_s(8) == 2.0  # nobody knows
    for _ in range(8):
        old.record(8, 0.01)
    assert new.deadline_s(8) == pytest.approx(0.4)
    assert new.deadline_s(500) == 2.0  # nobody has had so large a call
    for _ in range(120):
        old.record(8, 0.2)
    assert new.deadline_s(8) == 2.0  # others are slow: more than the bound is not waited
    for _ in range(8):
        new.record(8, 0.02)
    assert new.deadline_s(8) == pytest.approx(0.2)
    assert old.deadline_s(8) == pytest.approx(2.0)


def test_hedges_are_a_share_of_the_calls():
    budget = HedgeBudget(0.05, first=2)
    assert [budget.take(0) for _ in range(3)] == [True, True, False]
    assert [budget.take(20) for _ in range(2)] == [True, False]
