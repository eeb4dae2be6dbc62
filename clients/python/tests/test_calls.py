"""Calls take turns over the targets, and a request is cancelled wherever it is."""

import itertools

import grpc
import pytest

from expertmesh_client.calls import Calls, Cancellation
from expertmesh_client.errors import (
    Failure,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
    error_of,
)
from expertmesh_client.retry import RetryPolicy


def refusal(code=grpc.StatusCode.NOT_FOUND):
    return error_of(Failure(code=code, message="no"), "r")


def calls_of(num_targets, seed=0, model=""):
    return Calls(num_targets, RetryPolicy(), model=model, seed=seed)


def test_requests_take_turns_and_clients_do_not_all_begin_at_the_same_target():
    calls = calls_of(3)
    targets = [calls.generate("x", {}).begin(0.0).target for _ in range(6)]
    firsts = {calls_of(3, seed).generate("x", {}).begin(0.0).target for seed in range(20)}

    assert [(b - a) % 3 for a, b in itertools.pairwise(targets)] == [1] * 5
    assert firsts == {0, 1, 2}


def test_every_request_has_an_id_of_its_own_unless_it_is_given_one():
    calls = calls_of(1, model="m")
    requests = [calls.generate("x", {}).begin(0.0).request for _ in range(100)]
    given = calls.chat([], [], None, {"request_id": "r", "model": "other"}).begin(0.0).request

    assert len({request.request_id for request in requests}) == 100
    assert {request.model for request in requests} == {"m"}
    assert (given.request_id, given.model) == ("r", "other")


def test_all_targets_are_asked_before_nobody_knows_a_request():
    cancellation = Cancellation(None, 2, deadline_s=10.0)
    asked = [cancellation.target]
    assert cancellation.refused(refusal(), 0.0) == 0.0
    asked.append(cancellation.target)
    with pytest.raises(NotFoundError):
        cancellation.refused(refusal(), 0.0)

    assert asked == [0, 1]


def test_a_target_that_cannot_be_asked_leaves_it_open_whether_the_request_runs():
    cancellation = Cancellation(None, 2, deadline_s=10.0)
    cancellation.refused(refusal(grpc.StatusCode.UNAVAILABLE), 0.0)
    with pytest.raises(UnavailableError):
        cancellation.refused(refusal(), 0.0)


def test_targets_that_are_all_out_of_reach_are_asked_again_up_to_the_deadline():
    cancellation = Cancellation(None, 2, deadline_s=10.0)
    lost = refusal(grpc.StatusCode.UNAVAILABLE)
    assert cancellation.refused(lost, 0.0) == 0.0
    assert cancellation.refused(refusal(grpc.StatusCode.DEADLINE_EXCEEDED), 5.0) > 0
    assert cancellation.refused(lost, 9.0) == 0.0
    with pytest.raises(UnavailableError):
        cancellation.refused(lost, 10.0)


def test_a_request_of_this_client_is_asked_for_while_some_targets_are_out_of_reach():
    calls = calls_of(2)
    journey = calls.generate("x", {"request_id": "r"})
    cancellation = calls.cancellation("r", 30.0)
    assert cancellation.refused(refusal(grpc.StatusCode.UNAVAILABLE), 0.0) == 0.0
    assert cancellation.refused(refusal(), 0.0) > 0
    assert cancellation.refused(refusal(grpc.StatusCode.PERMISSION_DENIED), 1.0) == 0.0
    with pytest.raises(PermissionDeniedError):
        cancellation.refused(refusal(), 1.0)
    assert not journey.is_complete


def test_a_target_that_does_not_answer_leaves_time_for_the_others():
    cancellation = Cancellation(None, 3, deadline_s=30.0)
    assert [cancellation.timeout_s(t) for t in (0.0, 28.0, 31.0)] == [5.0, 2.0, 0.0]
    assert Cancellation(None, 1, deadline_s=30.0).timeout_s(0.0) == 30.0
    once = calls_of(3).retries(5.0, "r", only_at=1)
    once.begin(0.0)
    with pytest.raises(UnavailableError):  # the next one is asked instead
        once.after(Failure(code=grpc.StatusCode.UNAVAILABLE, message="gone"), 0.0)


def test_a_request_of_this_client_is_asked_for_until_it_has_ended():
    calls = calls_of(1)
    journey = calls.generate("x", {"request_id": "r"})
    cancellation = calls.cancellation("r", 30.0)
    assert cancellation.refused(refusal(), 0.0) > 0  # it may be on its way
    assert not cancellation.is_over
    assert len(journey.cancelled_rest()) == 1  # its stream broke, and is not begun anew
    assert cancellation.is_over


def test_a_request_that_nobody_ends_is_asked_for_up_to_the_deadline():
    journey = calls_of(1).generate("x", {})
    cancellation = Cancellation(journey, 1, deadline_s=10.0)
    assert cancellation.refused(refusal(), 9.9) > 0
    with pytest.raises(NotFoundError):
        cancellation.refused(refusal(), 10.0)


def test_requests_that_have_ended_are_forgotten():
    calls = calls_of(1)
    calls.generate("x", {"request_id": "r"})  # nobody keeps it

    assert calls.cancellation("r", 1.0)._journey is None
