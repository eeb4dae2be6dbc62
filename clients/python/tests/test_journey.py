"""A stream cut anywhere, any number of times: what the caller gets is the whole, once, in order."""

import random

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.python.tests.harness_errors import Broken
from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as pb
from expertmesh_client.collect import Collector
from expertmesh_client.errors import DuplicateRequestError, ExpertmeshError, UnavailableError
from expertmesh_client.journey import BrokenStreamError, Journey
from expertmesh_client.retry import Retries, RetryPolicy
from expertmesh_client.types import FinishReason

LOST = Broken(grpc.StatusCode.UNAVAILABLE)


class Server:
    """Answers as a front door does: from the request alone, behind the tokens it holds."""

    def __init__(self, replies, sizes, seed=77):
        self._replies = replies
        self._sizes = sizes
        self._seed = seed

    def answer(self, request):
        seed = request.sampling.seed if request.sampling.HasField("seed") else self._seed
        yield pb.GenerateResponse(request_id=request.request_id, seed=seed)
        has = {point.sequence_index: list(point.token_ids) for point in request.resume_from}
        positions = [len(has.get(index, [])) for index in range(len(self._replies))]
        for index, reply in enumerate(self._replies):
            assert has.get(index, []) == list(reply[: positions[index]])
            if positions[index] == len(reply):
                yield self._end(index, reply)
        step = 0
        while any(p < len(r) for p, r in zip(positions, self._replies, strict=True)):
            for index, reply in enumerate(self._replies):
                start = positions[index]
                if start == len(reply):
                    continue
                end = min(len(reply), start + self._sizes[step % len(self._sizes)])
                step += 1
                positions[index] = end
                response = self._end(index, reply) if end == len(reply) else pb.GenerateResponse()
                response.sequence_index = index
                response.first_token_index = start
                response.token_ids.extend(reply[start:end])
                response.text = "".join(map(text_of, reply[start:end]))
                yield response

    def _end(self, index, reply):
        return pb.GenerateResponse(
            sequence_index=index,
            first_token_index=len(reply),
            finish={
                "reason": pb.FINISH_REASON_LENGTH,
                "usage": {"prompt_tokens": 3, "completion_tokens": len(reply)},
            },
        )


def text_of(token_id):
    return f"<{token_id}>"


def journey_of(request, *, targets=1, policy=None):
    retries = Retries(
        policy or RetryPolicy(),
        targets=range(targets),
        turn=0,
        timeout_s=None,
        now_s=0.0,
        chance=random.Random(0),
    )
    return Journey(request, retries)


def carried(journey, server, cuts):
    """Carry a request, each attempt cut after as many messages as the next of the cuts says."""
    updates, attempts = [], []
    cuts = iter(cuts)
    while not journey.is_complete:
        attempt = journey.begin(0.0)
        attempts.append(attempt.request)
        left = next(cuts, 10**6)
        for number, response in enumerate(server.answer(attempt.request)):
            if number == left:
                break
            update = journey.take(response, 0.0)
            if update is not None:
                updates.append(update)
        if not journey.is_complete:
            journey.end(LOST, 0.0)
    return updates, attempts


def request_for(replies, **fields):
    sampling = {"num_sequences": len(replies)}
    return pb.GenerateRequest(request_id="r", text="x", sampling=sampling, **fields)


REPLIES = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).map(tuple), min_size=1, max_size=3
)
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(replies=REPLIES, sizes=SIZES, cuts=st.lists(st.integers(0, 8), max_size=20))
def test_a_stream_that_is_cut_anywhere_gives_the_whole_once_and_in_order(replies, sizes, cuts):
    journey = journey_of(request_for(replies))
    updates, attempts = carried(journey, Server(replies, sizes), cuts)
    collector = Collector(journey)
    for update in updates:
        collector.add(update)
    answer = collector.answer()

    assert (answer.request_id, answer.seed) == ("r", 77)
    assert [c.token_ids for c in answer.completions] == replies
    assert [c.text for c in answer.completions] == ["".join(map(text_of, r)) for r in replies]
    assert [c.finish.usage.completion_tokens for c in answer.completions] == list(map(len, replies))
    assert sum(u.finish is not None for u in updates) == len(replies)
    assert {a.request_id for a in attempts} == {"r"}
    assert {a.text for a in attempts} == {"x"}


def test_other_attempts_carry_the_seed_of_the_first_message_and_the_tokens():
    replies = [(1, 2, 3, 4), (5, 6, 7, 8)]
    journey = journey_of(request_for(replies))
    _, attempts = carried(journey, Server(replies, [1]), [1, 4])  # the first message; then tokens

    assert [a.sampling.HasField("seed") for a in attempts] == [False, True, True]
    assert journey.seed == 77
    assert [[tuple(p.token_ids) for p in a.resume_from] for a in attempts] == [
        [],
        [()],  # it was admitted
        [(1, 2), (5,)],
    ]


def test_a_request_that_the_server_holds_for_a_lost_connection_is_taken_over():
    journey = journey_of(request_for([(1,)]))
    journey.begin(0.0)
    journey.end(LOST, 0.0)
    assert not journey.begin(0.0).request.resume_from  # it may never have arrived
    journey.end(Broken(grpc.StatusCode.ALREADY_EXISTS), 0.0)
    (point,) = journey.begin(0.0).request.resume_from

    assert not point.token_ids


def test_a_request_of_somebody_else_is_not_taken_over():
    journey = journey_of(request_for([(1,)]))
    journey.begin(0.0)
    with pytest.raises(DuplicateRequestError):
        journey.end(Broken(grpc.StatusCode.ALREADY_EXISTS), 0.0)
    assert not journey.begin(0.0).request.resume_from


def test_a_seed_that_the_caller_sets_is_kept():
    journey = journey_of(pb.GenerateRequest(request_id="r", sampling={"seed": 0}))

    assert journey.seed == 0
    assert journey.begin(0.0).request.sampling.HasField("seed")


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (pb.GenerateResponse(first_token_index=3, token_ids=[9]), "at token 3 of sequence 0, not"),
        (pb.GenerateResponse(first_token_index=1, token_ids=[9]), "at token 1 of sequence 0, not"),
        (pb.GenerateResponse(sequence_index=1, token_ids=[9]), "a sequence 1 that was not asked"),
        (pb.GenerateResponse(seed=6), "has seed 6, not 5"),
    ],
)
def test_a_stream_that_does_not_follow_on_is_not_believed_but_asked_for_again(response, why):
    journey = journey_of(pb.GenerateRequest(request_id="r", sampling={"seed": 5}))
    journey.take(pb.GenerateResponse(token_ids=[1, 2]), 0.0)
    with pytest.raises(BrokenStreamError, match=why) as broken:
        journey.take(response, 0.0)
    assert journey.end(broken.value, 0.0) >= 0
    (point,) = journey.begin(0.0).request.resume_from

    assert list(point.token_ids) == [1, 2]


def test_a_stream_that_always_breaks_ends_by_the_bound_on_failures():
    journey = journey_of(pb.GenerateRequest(request_id="r"), policy=RetryPolicy(max_failures=5))
    for _ in range(5):
        journey.end(BrokenStreamError("it ended early"), 0.0)
    with pytest.raises(UnavailableError, match="it ended early; given up after 6 failures"):
        journey.end(BrokenStreamError("it ended early"), 0.0)


def test_a_cancelled_request_is_not_begun_anew_when_its_stream_breaks():
    journey = journey_of(request_for([(), (), ()]))
    journey.take(pb.GenerateResponse(sequence_index=1, token_ids=[1, 2]), 0.0)
    end = {"reason": pb.FINISH_REASON_CANCELLED, "usage": {"prompt_tokens": 3}}
    journey.take(pb.GenerateResponse(finish=end), 0.0)
    assert journey.end(LOST, 0.0) == 0.0
    rest = journey.cancelled_rest()

    assert [(u.sequence_index, u.first_token_index) for u in rest] == [(1, 2), (2, 0)]
    assert {u.finish.reason for u in rest} == {FinishReason.CANCELLED}
    assert [u.finish.usage.completion_tokens for u in rest] == [2, 0]
    assert [u.finish.usage.prompt_tokens for u in rest] == [3, 3]
    assert journey.is_complete


def test_a_request_that_was_not_cancelled_has_no_ends_to_make_up():
    journey = journey_of(request_for([()]))
    assert journey.cancelled_rest() == []

    journey.cancel()
    assert [u.finish.reason for u in journey.cancelled_rest()] == [FinishReason.CANCELLED]
    assert journey.cancelled_rest() == []


def test_a_failure_that_is_the_callers_ends_the_journey():
    journey = journey_of(request_for([()]))
    with pytest.raises(ExpertmeshError, match="why"):
        journey.end(Broken(grpc.StatusCode.INVALID_ARGUMENT, "why"), 0.0)
