"""What follows a failure: told the time, without a clock, a socket or a sleep."""

import random

import grpc
import pytest

from expertmesh_client.errors import (
    DeadlineError,
    DuplicateRequestError,
    ExpertmeshError,
    Failure,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from expertmesh_client.retry import Retries, RetryPolicy

CODE = grpc.StatusCode
POLICY = RetryPolicy()


def retries(policy=POLICY, *, targets=1, timeout_s=None, seed=0, now_s=100.0):
    return Retries(
        policy,
        targets=range(targets),
        turn=0,
        timeout_s=timeout_s,
        now_s=now_s,
        chance=random.Random(seed),
        request_id="r",
    )


def failed(code, message="it broke", **fields):
    return Failure(code=code, message=message, **fields)


LOST = failed(CODE.UNAVAILABLE)


@pytest.mark.parametrize(
    "failure",
    [
        LOST,
        failed(CODE.CANCELLED),
        failed(CODE.INTERNAL, "Received RST_STREAM with error code 2"),
        failed(CODE.UNKNOWN, "Stream removed"),
        failed(CODE.UNAVAILABLE, "GOAWAY received"),
    ],
)
def test_a_lost_connection_is_followed_by_another_attempt(failure):
    attempts = retries()
    attempts.begin(100.0)

    assert 0 <= attempts.after(failure, 100.0) <= POLICY.first_backoff_s


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (failed(CODE.INVALID_ARGUMENT), InvalidRequestError),
        (failed(CODE.INTERNAL, "internal error: AssertionError"), ExpertmeshError),
        (failed(CODE.UNKNOWN), ExpertmeshError),
        (failed(CODE.ALREADY_EXISTS), DuplicateRequestError),
        (failed(CODE.RESOURCE_EXHAUSTED, retry_after_s=1.0), OverloadedError),
        (failed(CODE.UNIMPLEMENTED), ExpertmeshError),
        (failed(CODE.DATA_LOSS), ExpertmeshError),
    ],
)
def test_what_would_fail_again_is_raised_at_once(failure, kind):
    attempts = retries()
    attempts.begin(100.0)
    with pytest.raises(kind) as raised:
        attempts.after(failure, 100.0)

    assert (raised.value.code, raised.value.request_id) == (failure.code, "r")


def test_every_other_target_is_tried_at_once_before_anything_is_waited_for():
    attempts = retries(targets=3)
    tried, waits = [], []
    for _ in range(6):
        attempts.begin(100.0)
        tried.append(attempts.target)
        waits.append(attempts.after(LOST, 100.0))

    assert tried == [0, 1, 2, 0, 1, 2]
    assert waits[:2] == [0.0, 0.0]
    assert all(wait_s > 0 for wait_s in waits[2:])


def test_waits_are_drawn_below_a_bound_that_doubles_up_to_the_longest():
    longest = []
    for seed in range(200):
        attempts = retries(seed=seed)
        longest.append([attempts.after(LOST, 100.0) for _ in range(10)])
    highest = [max(waits) for waits in zip(*longest, strict=True)]
    bounds = [min(POLICY.max_backoff_s, POLICY.first_backoff_s * 2**n) for n in range(10)]

    assert all(0.9 * b < h <= b for h, b in zip(highest, bounds, strict=True))
    assert len({waits[-1] for waits in longest}) == 200  # clients do not come back together


def test_a_new_token_starts_the_waits_and_the_count_anew():
    attempts = retries(RetryPolicy(max_failures=3))
    for _ in range(50):
        for _ in range(3):
            attempts.after(LOST, 100.0)
        attempts.progressed(100.0)

    with pytest.raises(UnavailableError, match="given up after 4 failures in a row"):
        [attempts.after(LOST, 100.0) for _ in range(4)]


def test_no_attempt_outlasts_the_callers_time():
    attempts = retries(timeout_s=10.0)

    assert attempts.begin(100.0) == 10.0
    assert attempts.begin(107.0) == 3.0
    with pytest.raises(DeadlineError, match="it broke"):
        attempts.after(LOST, 110.0)
    assert attempts.begin(111.0) == 0.0


def test_the_callers_deadline_is_final_even_if_tokens_came():
    attempts = retries(timeout_s=10.0)
    attempts.begin(100.0)
    attempts.progressed(109.0)
    with pytest.raises(DeadlineError):
        attempts.after(failed(CODE.DEADLINE_EXCEEDED), 109.999)


def test_without_a_deadline_an_attempt_that_brings_nothing_is_the_last():
    attempts = retries()
    assert attempts.begin(100.0) == POLICY.stall_s
    attempts.progressed(399.0)
    assert attempts.after(failed(CODE.DEADLINE_EXCEEDED), 400.0) == 0.0  # it was moving
    attempts.begin(400.0)
    with pytest.raises(DeadlineError, match="nothing new came for 300 s"):
        attempts.after(failed(CODE.DEADLINE_EXCEEDED), 700.0)


def test_failures_without_anything_new_end_by_the_stall_bound_however_many_they_are():
    attempts = retries()
    now_s, count = 100.0, 0
    while now_s <= 100.0 + POLICY.stall_s - POLICY.max_backoff_s:
        now_s += attempts.after(LOST, now_s)
        count += 1
    with pytest.raises(UnavailableError, match="without anything new"):
        attempts.after(LOST, 100.0 + POLICY.stall_s)

    assert count > 80
    assert now_s <= 100.0 + POLICY.stall_s


def test_a_request_that_the_server_still_holds_is_asked_for_again_for_a_while():
    attempts = retries(targets=2)
    attempts.after(LOST, 100.0)
    target = attempts.target
    for now_s in (101.0, 130.0, 160.0):
        assert attempts.after(failed(CODE.ALREADY_EXISTS), now_s) <= 0.4
        assert attempts.target == target  # who says so is alive, and will notice

    with pytest.raises(DuplicateRequestError):
        attempts.after(failed(CODE.ALREADY_EXISTS), 160.1)


def test_a_full_queue_is_waited_for_only_by_those_who_ask():
    full = failed(CODE.RESOURCE_EXHAUSTED, retry_after_s=2.0)
    patient = retries(RetryPolicy(waits_for_room=True, max_failures=0))
    waits = [patient.after(full, 100.0) for _ in range(50)]

    assert all(2.0 <= wait_s <= 2.5 for wait_s in waits)
    with pytest.raises(OverloadedError):
        patient.after(full, 399.0)
    with pytest.raises(OverloadedError):  # a message that is too large is none: nothing says when
        patient.after(failed(CODE.RESOURCE_EXHAUSTED), 100.0)


def test_a_server_that_says_wait_longer_than_the_caller_has_is_not_waited_for():
    patient = retries(RetryPolicy(waits_for_room=True), timeout_s=5.0)
    with pytest.raises(DeadlineError):
        patient.after(failed(CODE.RESOURCE_EXHAUSTED, retry_after_s=10.0), 100.0)
