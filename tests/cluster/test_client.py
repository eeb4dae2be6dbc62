"""The client library against real front doors whose connections break: every token once."""

import random

import pytest

from cluster.frontdoor.model import ModelInfo
from expertmesh_client import AsyncClient, FinishReason, RetryPolicy, Sampling
from tests.cluster.harness_frontdoor import DEMO, front_door, saying
from tests.cluster.harness_proxy import cutting_proxy
from tests.fakes import FakeGateway

GREETING = "the quick brown fox jumps over the lazy dog"
# Characters of one to four bytes, and words of several tokens.
TEXTS = (
    "Fünf große Füchse sprängen über den faulen Hund — 日本語のテキスト 🦊🐕 " * 3,
    "sphinx of black quartz judge my vow 🏴\u200d☠️ " * 4,
)
CALL = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
SPOKEN = f"I think, 🦊 and so on.\n\nStill.\n</think>\n\nFirst, ünd\n\n{CALL}\n{CALL}"
QUICK = RetryPolicy(first_backoff_s=0.005, max_backoff_s=0.05)
SEED = 20_26


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    return ModelInfo.load(DEMO, name="demo")


def tokens_of(model, text):
    return (*model.tokenizer.encode(text), model.eos_token_ids[0])


def drawn(chance, low, high):
    return lambda: chance.randint(low, high)


def is_in_order(updates):
    """Say whether each sequence's tokens come without gap or repeat."""
    counts = {}
    for update in updates:
        if update.first_token_index != counts.get(update.sequence_index, 0):
            return False
        counts[update.sequence_index] = update.first_token_index + len(update.token_ids)
    return True


async def test_a_stream_that_is_cut_50_times_brings_every_token_once(model):
    chance = random.Random(SEED)
    gateway = FakeGateway(saying(model, *TEXTS))
    async with (
        front_door(gateway, model=model) as site,
        cutting_proxy(site.address, drawn(chance, 100, 4000)) as (proxy, address),
        AsyncClient(address, retry=QUICK, seed=SEED) as client,
    ):
        while proxy.num_cuts < 50:
            stream = client.generate("x", sampling=Sampling(num_sequences=2), timeout_s=60)
            updates = [update async for update in stream]
            answer = await stream.collect()

            assert is_in_order(updates)
            assert [c.token_ids for c in answer.completions] == [tokens_of(model, t) for t in TEXTS]
            assert [c.text for c in answer.completions] == list(TEXTS)
            assert [c.finish.reason for c in answer.completions] == [FinishReason.STOP] * 2
            seeds = {request.sampling.seed for request in gateway.submitted}
            assert answer.seed in seeds
        assert site.door.stats().in_flight == 0
    assert len(gateway.submitted) > 50 / 2
