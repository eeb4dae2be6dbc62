"""Who is let in: the rules of each field, the bounds of the queue, and who calls."""

from dataclasses import replace

import pytest

from cluster.frontdoor.admission import Admission, Job, check
from cluster.frontdoor.metrics import NoMetrics
from cluster.frontdoor.options import FrontDoorOptions
from workers.errors import (
    DrainingError,
    InvalidRequestError,
    OverloadedError,
)
from workers.types import Output, Request, Sampling, Stopping

NAN = float("nan")
GOOD = Job(
    request=Request(
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        sampling=Sampling(seed=1),
        stopping=Stopping(max_tokens=7, stop_token_ids=(4,)),
    ),
    stop_strings=("end",),
)


def job(*, sampling=None, stopping=None, output=None, request=None, **fields):
    """Return the good job with some fields changed."""
    inner = replace(
        GOOD.request,
        sampling=replace(GOOD.request.sampling, **(sampling or {})),
        stopping=replace(GOOD.request.stopping, **(stopping or {})),
        output=replace(Output(), **(output or {})),
        **(request or {}),
    )
    return replace(GOOD, request=inner, **fields)


def check_job(candidate):
    check(candidate, FrontDoorOptions(), context_tokens=10, vocab_size=100)


REFUSED = [
    ("sampling.temperature", {"sampling": {"temperature": -0.1}}),
    ("sampling.temperature", {"sampling": {"temperature": 101.0}}),
    ("sampling.temperature", {"sampling": {"temperature": NAN}}),
    ("sampling.top_p", {"sampling": {"top_p": 0.0}}),
    ("sampling.top_p", {"sampling": {"top_p": 1.5}}),
    ("sampling.top_p", {"sampling": {"top_p": NAN}}),
    ("sampling.top_k", {"sampling": {"top_k": -1}}),
    ("sampling.top_k", {"sampling": {"top_k": 101}}),
    ("sampling.min_p", {"sampling": {"min_p": -0.1}}),
    ("sampling.min_p", {"sampling": {"min_p": 1.1}}),
    ("sampling.presence_penalty", {"sampling": {"presence_penalty": 2.1}}),
    ("sampling.frequency_penalty", {"sampling": {"frequency_penalty": -2.1}}),
    ("sampling.repetition_penalty", {"sampling": {"repetition_penalty": 1e-40}}),
    ("sampling.logit_bias[100]", {"sampling": {"logit_bias": ((100, 1.0), (101, 101.0))}}),
    ("stopping.stop_token_ids[1]", {"stopping": {"stop_token_ids": (1, 100, 101)}}),
    ("resume_from", {"request": {"emitted": ((1, 100, 101),)}}),
    ("sampling.repetition_penalty", {"sampling": {"repetition_penalty": float("inf")}}),
    ("sampling.logit_bias[100]", {"sampling": {"logit_bias": ((100, 1.0),)}}),
    ("sampling.logit_bias[5]", {"sampling": {"logit_bias": ((5, 101.0),)}}),
    ("sampling.logit_bias", {"sampling": {"logit_bias": ((5, 1.0),) * 1025}}),
    ("sampling.num_sequences", {"request": {"num_sequences": 0}}),
    ("sampling.num_sequences", {"request": {"num_sequences": 17}}),
    ("stopping.max_tokens", {"stopping": {"max_tokens": 0}}),
    ("stopping.max_tokens", {"stopping": {"max_tokens": 8}}),
    ("stopping.min_tokens", {"stopping": {"min_tokens": 8}}),
    ("stopping.stop_token_ids[0]", {"stopping": {"stop_token_ids": (100,)}}),
    ("stopping.stop_token_ids", {"stopping": {"stop_token_ids": (1,) * 1025}}),
    ("stopping.stop_strings[1]", {"stop_strings": ("a", "")}),
    ("stopping.stop_strings[0]", {"stop_strings": ("a" * 257,)}),
    ("stopping.stop_strings", {"stop_strings": ("a",) * 17}),
    ("output.logprobs", {"output": {"logprobs": 21}}),
    ("output.prompt_logprobs", {"output": {"prompt_logprobs": 21}}),
    ("text", {"request": {"prompt_token_ids": ()}}),
    ("messages", {"request": {"prompt_token_ids": (1,) * 10}, "prompt_field": "messages"}),
    (
        "token_ids.ids[1]",
        {"request": {"prompt_token_ids": (1, 100)}, "prompt_field": "token_ids.ids"},
    ),
    ("request_id", {"request": {"request_id": "r" * 129}}),
    ("resume_window_s", {"request": {"resume_window_s": -1.0}}),
    ("resume_window_s", {"request": {"resume_window_s": NAN}}),
    ("resume_from", {"request": {"emitted": ((1,) * 8,)}}),
    ("resume_from", {"request": {"emitted": ((100,),)}}),
]


@pytest.mark.parametrize(("field", "change"), REFUSED)
def test_each_rule_names_the_field_that_breaks_it(field, change):
    with pytest.raises(InvalidRequestError) as refusal:
        check_job(job(**change))
    assert [v.field for v in refusal.value.violations] == [field]
    assert len(refusal.value.violations[0].description) > 10


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 100, "min_p": 1.0}},
        {"sampling": {"presence_penalty": -2.0, "frequency_penalty": 2.0}},
        {"sampling": {"logit_bias": ((99, -100.0),), "repetition_penalty": 10.0}},
        {"stopping": {"min_tokens": 7}},
        {"output": {"logprobs": 0, "prompt_logprobs": 20}},
        {"request": {"emitted": ((1,) * 7,), "resume_window_s": 3600.0}},
        {"request": {"num_sequences": 16}},
    ],
)
def test_the_ends_of_each_range_are_allowed(change):
    check_job(job(**change))


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(InvalidRequestError) as refusal:
        check_job(job(sampling={"top_p": 2.0, "min_p": 2.0}, request={"prompt_token_ids": ()}))
    fields = [v.field for v in refusal.value.violations]
    assert fields == ["sampling.top_p", "sampling.min_p", "text"]


def test_prompt_log_probabilities_must_fit_into_a_message():
    many = job(request={"prompt_token_ids": (1,) * 50_000}, output={"prompt_logprobs": 20})
    with pytest.raises(InvalidRequestError, match="50000 prompt tokens with 20 alternatives"):
        check(many, FrontDoorOptions(), context_tokens=100_000, vocab_size=100)


class Load(NoMetrics):
    def __init__(self):
        self.seen = []

    def load_changed(self, in_flight, waiting):
        self.seen.append((in_flight, waiting))


def test_places_are_taken_and_given_back():
    load = Load()
    admission = Admission(FrontDoorOptions(), load)
    with admission.admitted(is_resumed=False) as started:
        started()
    assert load.seen == [(1, 1), (1, 0), (0, 0)]


@pytest.mark.parametrize("bound", ["max_waiting", "max_requests"])
def test_a_full_queue_refuses_new_requests_and_never_resumed_ones(bound):
    admission = Admission(FrontDoorOptions(**{bound: 1}, retry_after_s=3.0), NoMetrics())
    with admission.admitted(is_resumed=False) as started:
        with pytest.raises(OverloadedError, match="the queue is full: 1 requests") as refusal:
            admission.check_room()
        assert refusal.value.retry_after_s == 3.0
        with admission.admitted(is_resumed=True):
            assert (admission.num_running, admission.num_waiting) == (2, 1)
        started()
        if bound == "max_waiting":
            admission.check_room()


async def test_draining_refuses_everybody_and_waits_for_the_rest():
    admission = Admission(FrontDoorOptions(), NoMetrics())
    with admission.admitted(is_resumed=False):
        admission.is_draining = True
        with pytest.raises(DrainingError):
            admission.check_room(is_resumed=True)
        assert not await admission.wait_idle(0.0)
    assert await admission.wait_idle(0.0)
