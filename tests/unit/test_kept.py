"""What a gateway keeps of a request: whoever comes back gets exactly what is lacking."""

from dataclasses import replace

import pytest

from cluster.frontdoor.silence import Silence
from cluster.ownership.holdings import Holdings
from cluster.ownership.kept import EVENT_TOKENS, KeptRequest
from tests.fakes import FakeClock
from workers.errors import IsolatedError, StaleAssignmentError
from workers.types import (
    FinishReason,
    GatewayStats,
    Output,
    PrefixPlace,
    Request,
    Sampling,
    SnapshotPlace,
    Stopping,
    TokenEvent,
    TokenLogprob,
)

REQUEST = Request(
    request_id="r",
    prompt_token_ids=(1, 2),
    sampling=Sampling(seed=1),
    stopping=Stopping(max_tokens=9),
    num_sequences=2,
    assignment=1,
    resume_window_s=5.0,
)


def event(first: int, *token_ids: int, index: int = 0, finish=None, **fields) -> TokenEvent:
    return TokenEvent(
        request_id="r",
        sequence_index=index,
        assignment=1,
        first_token_index=first,
        token_ids=token_ids,
        logprobs=tuple(TokenLogprob(t, -0.5) for t in token_ids),
        finish=finish,
        **fields,
    )


def asked(*emitted: tuple[int, ...], assignment: int = 2, **fields) -> Request:
    return replace(REQUEST, emitted=emitted, assignment=assignment, **fields)


def test_each_sequence_gets_what_it_lacks_and_its_end() -> None:
    kept = KeptRequest(REQUEST)
    kept.take(event(0, 5, cached_tokens=1))
    kept.take(event(1, 6, 7, finish=FinishReason.LENGTH))
    kept.take(event(0, 8, index=1))

    first, second = kept.since(asked((5,), ()))
    assert (first.first_token_index, first.token_ids, first.assignment) == (1, (6, 7), 2)
    assert [entry.token_id for entry in first.logprobs] == [6, 7]
    assert (first.finish, first.cached_tokens) == (FinishReason.LENGTH, 1)
    assert (second.first_token_index, second.token_ids, second.finish) == (0, (8,), None)
    (end,) = kept.since(asked((5, 6, 7), (8,)))
    assert (end.token_ids, end.finish) == ((), FinishReason.LENGTH)


def test_however_much_has_come_no_event_is_larger_than_a_message_may_be() -> None:
    kept, many = KeptRequest(REQUEST), 2 * EVENT_TOKENS + 3
    kept.take(event(0, *range(many), finish=FinishReason.LENGTH))

    events = kept.since(asked((0,), ()))
    assert [e.first_token_index for e in events] == [1, 1 + EVENT_TOKENS, 1 + 2 * EVENT_TOKENS]
    assert [t for e in events for t in e.token_ids] == list(range(1, many))
    assert all([p.token_id for p in e.logprobs] == list(e.token_ids) for e in events)
    assert [e.finish for e in events] == [None, None, FinishReason.LENGTH]


@pytest.mark.parametrize(
    ("request_", "continues"),
    [
        (asked(), True),
        (asked((5,), ()), True),
        (asked((5, 6), (8,)), True),
        (asked((6,), ()), False),  # other tokens
        (asked((5, 6, 7), ()), False),  # more than there is
        (asked(prompt_token_ids=(1,)), False),
        (asked(sampling=Sampling(seed=2)), False),
        (asked(resume_window_s=0.0, deaths=1), True),
        (asked(was_admitted=True), True),
        (asked(prefix=PrefixPlace(1, "gateway-0.1")), True),
    ],
)
def test_only_a_beginning_of_the_same_request_is_continued(request_, continues) -> None:
    kept = KeptRequest(REQUEST)
    kept.take(event(0, 5, 6))
    kept.take(event(0, 8, index=1))

    assert kept.continues(request_) == continues


def test_log_probabilities_that_were_never_here_cannot_be_given_again() -> None:
    with_logprobs = Output(logprobs=0)
    kept = KeptRequest(asked((5, 6), (), output=with_logprobs))
    kept.take(event(2, 7))

    assert not kept.continues(asked((5,), (), output=with_logprobs))
    assert kept.continues(asked((5, 6), (), output=with_logprobs))
    (rest,) = kept.since(asked((5, 6), (), output=with_logprobs))
    assert [entry.token_id for entry in rest.logprobs] == [7]


def test_prompt_log_probabilities_come_with_the_first_token_only() -> None:
    kept = KeptRequest(replace(REQUEST, output=Output(prompt_logprobs=0)))
    kept.take(event(0, 5, prompt_logprobs=(None, TokenLogprob(2, -1.0))))

    (whole,) = kept.since(asked())
    (rest,) = kept.since(asked((), (8,)))[:1]
    assert len(whole.prompt_logprobs) == len(rest.prompt_logprobs) == 2
    kept.take(event(1, 6))
    assert kept.since(asked((5,), ()))[0].prompt_logprobs == ()


class Worker:
    """The engine as the endpoint sees it."""

    failure = None

    def __init__(self) -> None:
        self.running: dict[str, Request] = {}
        self.aborted: list[str] = []

    def submit(self, request, sink, snapshots) -> None:
        self.snapshots = snapshots
        assert request.request_id not in self.running
        self.running[request.request_id] = request

    def abort(self, request_id) -> None:
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    def stats(self) -> GatewayStats:
        return GatewayStats()


class Ear:
    """A session."""

    def __init__(self, front_door: str) -> None:
        self.front_door = front_door
        self.events: list[TokenEvent] = []
        self.lost: list[tuple[str, int]] = []
        self.places: list[tuple[str, int, SnapshotPlace]] = []

    def push(self, events) -> None:
        self.events.extend(events)

    def held(self, request_id, assignment, place) -> None:
        self.places.append((request_id, assignment, place))

    def superseded(self, request_id, assignment) -> None:
        self.lost.append((request_id, assignment))


class Bench:
    """Holdings with what they talk to; two sessions."""

    def __init__(self, *, max_kept_tokens: int = 100) -> None:
        self.worker, self.clock = Worker(), FakeClock()
        self.a, self.b = Ear("a"), Ear("b")
        self.holdings = Holdings(
            self.worker,
            lambda _events: None,
            self.clock,
            max_window_s=60.0,
            max_kept_tokens=max_kept_tokens,
        )


ONE = replace(REQUEST, num_sequences=1)


def test_a_later_call_gets_what_was_kept_and_all_that_follows() -> None:
    bench = Bench()
    bench.holdings.submit(ONE, bench.a)
    bench.holdings.take([event(0, 5)])
    bench.holdings.submit(replace(ONE, assignment=7), bench.b)
    bench.holdings.take([event(1, 6)])

    assert [(e.assignment, e.token_ids) for e in bench.a.events] == [(1, (5,))]
    assert [(e.assignment, e.token_ids) for e in bench.b.events] == [(7, (5,)), (7, (6,))]
    assert bench.a.lost == [("r", 1)]
    assert not bench.worker.aborted


@pytest.mark.parametrize("assignment", [1, 2])
def test_an_assignment_that_is_not_newer_is_refused(assignment: int) -> None:
    bench = Bench()
    bench.holdings.submit(replace(ONE, assignment=2), bench.b)

    with pytest.raises(StaleAssignmentError) as refusal:
        bench.holdings.submit(replace(ONE, assignment=assignment), bench.a)
    assert refusal.value.held == 2
    bench.holdings.abort("r", 1)
    assert bench.worker.running


@pytest.mark.parametrize("window_s", [0.0, 5.0])
def test_a_request_goes_on_without_a_client_for_its_window(window_s: float) -> None:
    bench = Bench()
    bench.holdings.submit(replace(ONE, resume_window_s=window_s), bench.a)
    bench.holdings.listener_gone(bench.a)
    assert bool(bench.worker.running) == (window_s > 0)

    bench.holdings.take([event(0, 5)])
    bench.clock.time_s = window_s
    bench.holdings.tick()
    assert not bench.worker.running
    assert len(bench.holdings) == 0


def test_a_window_ends_when_somebody_comes_back() -> None:
    bench = Bench()
    bench.holdings.submit(ONE, bench.a)
    bench.holdings.detach("r", 1)
    bench.holdings.submit(replace(ONE, assignment=2), bench.b)
    bench.clock.time_s = 100.0
    bench.holdings.tick()
    assert bench.worker.running


def test_an_ended_request_is_kept_and_the_oldest_is_forgotten_for_want_of_room() -> None:
    bench = Bench(max_kept_tokens=3 + len(ONE.prompt_token_ids))
    for number, name in enumerate("rst"):
        bench.clock.time_s = float(number)
        bench.holdings.submit(replace(ONE, request_id=name), bench.a)
        end = replace(event(0, 5, 6, finish=FinishReason.LENGTH), request_id=name)
        bench.holdings.take([end])

    assert len(bench.holdings) == 1
    bench.holdings.submit(replace(ONE, request_id="t", assignment=2), bench.b)
    assert bench.b.events[0].token_ids == (5, 6)
    assert not bench.worker.aborted


def test_a_request_that_failed_is_not_kept() -> None:
    bench = Bench()
    bench.holdings.submit(ONE, bench.a)
    bench.holdings.take([event(0, finish=FinishReason.ERROR, error="no")])
    assert bench.a.events[0].error == "no"
    assert len(bench.holdings) == 0


def test_two_suspects_never_run_side_by_side() -> None:
    bench = Bench()
    bench.holdings.submit(replace(ONE, deaths=2), bench.a)
    bench.holdings.submit(replace(ONE, request_id="s", deaths=1), bench.a)
    suspect = replace(ONE, request_id="t", deaths=2)
    with pytest.raises(IsolatedError, match="request r runs here"):
        bench.holdings.submit(suspect, bench.a)
    bench.holdings.take([event(0, 5, finish=FinishReason.LENGTH)])
    bench.holdings.submit(suspect, bench.a)


def test_a_suspect_that_has_come_far_keeps_no_other_one_waiting() -> None:
    bench = Bench()
    bench.holdings.submit(replace(ONE, deaths=2), bench.a)
    other = replace(ONE, request_id="t", deaths=2)
    bench.holdings.take([event(0, *range(5, 16))])
    with pytest.raises(IsolatedError):
        bench.holdings.submit(other, bench.b)

    bench.holdings.take([event(11, 16)])
    bench.holdings.submit(other, bench.b)
    assert set(bench.worker.running) == {"r", "t"}


def test_a_listener_that_was_held_up_itself_takes_nobody_for_silent() -> None:
    silence = Silence(2.0)
    for _ in range(50):  # each may have lasted for minutes
        silence.tick()
        assert not silence.is_too_long
        silence.broken()
    for _ in range(round(2.0 / silence.tick_s)):
        assert not silence.is_too_long
        silence.tick()
    assert silence.is_too_long


def test_whoever_listens_hears_of_snapshots_under_its_own_assignment() -> None:
    bench = Bench()
    bench.holdings.submit(ONE, bench.a, {0: "whole"})
    place = SnapshotPlace(0, 3, "other.1")
    bench.holdings.snapshot("r", 1, place)
    bench.holdings.submit(replace(ONE, assignment=2), bench.b)
    bench.holdings.snapshot("r", 1, place)
    bench.holdings.snapshot("r", 9, place)

    assert bench.worker.snapshots == {0: "whole"}
    assert bench.a.places == [("r", 1, place)]
    assert bench.b.places == [("r", 2, place)]
