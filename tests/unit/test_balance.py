"""Which gateway a request goes to, and from where that one fetches the begin of its prompt."""

from collections import Counter
from dataclasses import replace

import pytest

from cluster.frontdoor.balance import GatewayLoad, KeptPrompt, choose_gateway, has_room
from cluster.frontdoor.pace import Pace, relative
from cluster.frontdoor.seats import Seat
from workers.placement import MemberId
from workers.types import (
    FinishReason,
    GatewayStats,
    PrefixPlace,
    Request,
    Sampling,
    Stopping,
    TokenEvent,
)

A, B, C = (MemberId(f"gateway-{i}", 1) for i in range(3))


def test_the_gateway_with_the_fewest_outstanding_tokens_is_chosen():
    loads = [
        GatewayLoad(id=A, outstanding_tokens=30),
        GatewayLoad(id=C, outstanding_tokens=21),
        GatewayLoad(id=B, outstanding_tokens=20),
    ]
    assert choose_gateway(loads) == B
    assert choose_gateway(loads, {B}) == C
    assert choose_gateway(loads, {A, B, C}) is None
    assert choose_gateway([]) is None


def test_equal_gateways_get_different_requests_and_one_request_always_the_same():
    loads = [GatewayLoad(id=gateway, outstanding_tokens=20) for gateway in (A, B, C)]
    chosen = [choose_gateway(loads, name=f"r-{i}") for i in range(300)]

    assert chosen == [choose_gateway(loads[::-1], name=f"r-{i}") for i in range(300)]
    assert min(Counter(chosen)[gateway] for gateway in (A, B, C)) > 70


def test_a_full_gateway_comes_last_whatever_it_keeps():
    full = GatewayLoad(id=A, outstanding_tokens=0, cached_tokens=900, has_room=False)
    busy = GatewayLoad(id=B, outstanding_tokens=5000)

    assert choose_gateway([full, busy], num_tokens=1000) == B
    assert choose_gateway([full, busy], {B}, num_tokens=1000) == A


def test_a_slow_gateway_gets_less_and_an_idle_slow_one_still_some():
    def chosen(outstanding_tokens):
        return choose_gateway(
            [
                GatewayLoad(id=A, outstanding_tokens=0, pace=3.0),
                GatewayLoad(id=B, outstanding_tokens=outstanding_tokens),
            ],
            num_tokens=100,
        )

    assert [chosen(tokens) for tokens in (0, 199, 201)] == [B, B, A]


@pytest.mark.parametrize(
    ("num_sequences", "kv_blocks_used", "expected"),
    [(6, 0, True), (7, 0, False), (0, 95, True), (0, 96, False)],
)
def test_there_is_room_while_states_and_blocks_are_free(num_sequences, kv_blocks_used, expected):
    stats = GatewayStats(state_blocks_total=8, kv_blocks_total=100, kv_blocks_used=kv_blocks_used)
    assert has_room(stats, num_sequences, num_new=2) is expected


def steps(count: int, step_s: float, running: int = 2) -> GatewayStats:
    return GatewayStats(steps=count, step_s=count * step_s, running=running)


def test_a_pace_is_known_from_the_second_report_on_and_follows_the_last_ones():
    pace = Pace()
    assert pace.cost_s is None
    pace.note(steps(100, 0.5), 0.0)
    assert pace.cost_s is None
    pace.note(steps(110, 0.5), 1.0)
    assert pace.cost_s == pytest.approx(0.05)
    slow = GatewayStats(steps=120, step_s=110 * 0.5 + 10 * 2.0, running=2)
    pace.note(slow, 2.0)
    assert 0.05 < pace.cost_s < 0.2


def test_a_gateway_of_more_sequences_is_not_slow_for_its_longer_steps():
    few, many = Pace(), Pace()
    for pace, running, step_s in ((few, 2, 0.10), (many, 12, 0.20)):
        pace.note(steps(0, step_s, running), 0.0)
        pace.note(steps(10, step_s, running), 0.0)
    assert many.cost_s == pytest.approx(few.cost_s)


def test_a_step_that_does_not_end_counts_and_rest_does_not():
    pace = Pace()
    pace.note(steps(0, 0.1), 0.0)
    pace.note(steps(10, 0.1), 1.0)
    pace.note(steps(10, 0.1), 4.0)
    assert pace.cost_s == pytest.approx(0.3)

    pace.note(steps(20, 0.1, running=0), 4.0)
    pace.note(steps(20, 0.1, running=0), 9.0)
    assert pace.cost_s == pytest.approx(0.1 / 8)
    pace.note(steps(20, 0.1, running=1), 9.5)
    assert pace.cost_s == pytest.approx(0.1 / 9)
    pace.note(steps(21, 0.1, running=0), 10.0)
    pace.note(steps(21, 0.1, running=0), 30.0)  # a pause after which nothing is known
    assert pace.cost_s is None


def test_when_a_gateway_was_heard_last_says_nothing_of_its_steps():
    early, late = Pace(), Pace()
    for pace, phase_s in ((early, 0.0), (late, 0.24)):
        for number in range(3):
            pace.note(steps(10 * number, 0.02), 0.25 * number + phase_s)
    assert early.cost_s == late.cost_s == pytest.approx(0.002)


def test_another_process_under_the_name_begins_anew():
    pace = Pace()
    pace.note(steps(100, 0.1), 0.0)
    pace.note(steps(110, 0.1), 1.0)
    pace.note(steps(3, 0.1), 2.0)
    assert pace.cost_s is None


def test_paces_are_told_by_the_usual_one_and_never_too_far_from_it():
    costs = [0.01, 0.02, 0.2]
    assert [relative(cost, costs) for cost in costs] == [0.5, 1.0, 4.0]
    assert relative(None, costs) == relative(0.1, []) == 1.0


class Nobody:
    request_id, assignment = "r", 1

    def deliver(self, event):
        pass


def seat(spared=0, **changes) -> Seat:
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(range(100)),
        sampling=Sampling(),
        **{"stopping": Stopping(max_tokens=1000)} | changes,
    )
    return Seat(Nobody(), request, spared, expected_tokens=256)


def token(index: int, count: int = 1, sequence: int = 0) -> TokenEvent:
    return TokenEvent(
        request_id="r", sequence_index=sequence, assignment=1,
        first_token_index=index, token_ids=(7,) * count,
    )  # fmt: skip


def test_what_is_delivered_is_no_longer_ahead():
    mine = seat(spared=60)
    assert mine.tokens_ahead == 40 + 256
    mine.deliver(token(0))
    assert mine.tokens_ahead == 255
    mine.deliver(token(1, 250))
    assert mine.tokens_ahead == 64  # it goes on for longer than was expected
    mine.deliver(token(251, 739))
    assert mine.tokens_ahead == 10  # it may not


def test_sequences_that_have_ended_are_not_ahead_and_take_no_room():
    mine = seat(num_sequences=3)
    for index in (0, 2):
        mine.deliver(replace(token(0, 5, index), finish=FinishReason.STOP))
    assert (mine.num_running, mine.tokens_ahead) == (1, 256)


def test_what_a_request_comes_with_is_computed_again_and_is_not_expected_again():
    emitted = ((1,) * 50, (1,) * 30)
    assert seat(num_sequences=2, emitted=emitted).tokens_ahead == 150 + 206 + 226
    assert seat(spared=140, num_sequences=2, emitted=emitted).tokens_ahead == 10 + 206 + 226
    assert seat(stopping=Stopping(max_tokens=60), emitted=((1,) * 50,)).tokens_ahead == 150 + 10


def test_a_kept_prefix_draws_requests_until_its_gateway_is_busier_by_as_much():
    warm, cold = B, A

    def chosen(outstanding_tokens):
        return choose_gateway(
            [
                GatewayLoad(id=warm, outstanding_tokens=outstanding_tokens, cached_tokens=500),
                GatewayLoad(id=cold, outstanding_tokens=500),
            ]
        )

    assert [chosen(tokens) for tokens in (600, 999, 1001)] == [warm, warm, cold]


@pytest.mark.parametrize(
    ("kept", "at_a", "at_b"),
    [
        ({}, None, None),
        ({A: 0, B: 0}, None, None),
        ({A: 1100, B: 0}, None, None),
        ({A: 1101, B: 0}, None, PrefixPlace(1101, "gateway-0.1")),
        ({A: 1101, B: 1}, None, None),
        ({A: 1101}, None, PrefixPlace(1101, "gateway-0.1")),  # b is not heard yet
        ({A: 0, C: 4000, B: 2000}, PrefixPlace(4000, "gateway-2.1"),
         PrefixPlace(4000, "gateway-2.1")),
        ({C: 4000, A: 4000}, None, PrefixPlace(4000, "gateway-2.1")),
    ],
)  # fmt: skip
def test_a_prefix_is_fetched_where_it_spares_more_than_it_costs(kept, at_a, at_b):
    prompt = KeptPrompt(kept, fetch_tokens=1100)
    assert (prompt.elsewhere(A), prompt.elsewhere(B)) == (at_a, at_b)


def test_nothing_is_fetched_where_that_is_off():
    prompt = KeptPrompt({A: 9000, B: 5})
    assert (prompt.elsewhere(B), prompt.spared(B), prompt.spared(A)) == (None, 5, 9000)


def test_a_kept_prefix_draws_requests_until_fetching_it_is_cheaper_than_waiting():
    prompt = KeptPrompt({A: 5000, B: 0}, fetch_tokens=1000)

    def chosen(outstanding_at_a):
        return choose_gateway(
            GatewayLoad(id=g, outstanding_tokens=n, cached_tokens=prompt.spared(g))
            for g, n in ((A, outstanding_at_a), (B, 5000))
        )

    assert [chosen(tokens) for tokens in (5000, 5999, 6001)] == [A, A, B]
