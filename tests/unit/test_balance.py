"""Which gateway a request goes to, and from where that one fetches the begin of its prompt."""

import pytest

from cluster.frontdoor.balance import GatewayLoad, KeptPrompt, choose_gateway
from workers.placement import MemberId
from workers.types import PrefixPlace

A, B, C = (MemberId(f"gateway-{i}", 1) for i in range(3))


def test_the_gateway_with_the_fewest_outstanding_tokens_is_chosen():
    loads = [
        GatewayLoad(id=A, outstanding_tokens=30),
        GatewayLoad(id=C, outstanding_tokens=20),
        GatewayLoad(id=B, outstanding_tokens=20),
    ]
    assert choose_gateway(loads) == B
    assert choose_gateway(loads, {B}) == C
    assert choose_gateway(loads, {A, B, C}) is None
    assert choose_gateway([]) is None


def test_a_kept_prefix_draws_requests_until_its_gateway_is_busier_by_as_much():
    warm, cold = B, A

    def chosen(outstanding_tokens):
        return choose_gateway(
            [
                GatewayLoad(id=warm, outstanding_tokens=outstanding_tokens, cached_tokens=500),
                GatewayLoad(id=cold, outstanding_tokens=100),
            ]
        )

    assert [chosen(tokens) for tokens in (100, 599, 601)] == [warm, warm, cold]


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
            for g, n in ((A, outstanding_at_a), (B, 100))
        )

    assert [chosen(tokens) for tokens in (100, 1099, 1101)] == [A, A, B]
