import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.harness_gateway import make_request
from workers.model.sampler import SamplerState, sample, score
from workers.types import Output, Stopping

VOCAB_SIZE = 2000


def random_logits(num_rows=1, seed=0, vocab_size=VOCAB_SIZE):
    return 4 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def state(index=0, completion=(), prompt=(1, 2, 3), **settings):
    return SamplerState(make_request(prompt=prompt, **settings), index, completion)


def choose(logits, *states):
    return [choice.token_id for choice in sample(logits, states)]


def passing(logits_V, sampling):
    """Return the probabilities that pass the filters, token by token, by the book."""
    scaled = logits_V.double().numpy() / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    order = [i for i in order if probabilities[i] >= sampling.min_p * probabilities.max()]
    order = order[: sampling.top_k or None]
    total, kept, before = sum(probabilities[order]), {}, 0.0
    for i in order:
        if before / total >= sampling.top_p:
            break
        kept[i] = probabilities[i]
        before += probabilities[i]
    return kept


def chosen_by_the_book(logits_V, sampler):
    kept = sorted(passing(logits_V, sampler.sampling).items())
    target, before = sampler.uniform() * sum(p for _, p in kept), 0.0
    for token_id, probability in kept:
        before += probability
        if before > target:
            return token_id
    raise AssertionError


def test_greedy_rows_take_the_first_of_the_largest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])

    assert choose(logits, state(), state()) == [1, 0]
    assert choose(logits, state(), state(logit_bias=((2, 9.0),))) == [1, 2]


@settings(derandomize=True, max_examples=120, deadline=None)
@given(
    st.floats(0.2, 3.0), st.sampled_from([0, 1, 5, 300, 1999, 5000]),
    st.sampled_from([1.0, 0.99, 0.5, 0.01]), st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_a_drawn_token_inverts_the_filtered_distribution(temperature, top_k, top_p, min_p, seed):
    logits = random_logits(seed=seed % 7)
    sampler = state(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)

    assert choose(logits, sampler) == [chosen_by_the_book(logits[0], sampler)]


def test_filters_break_ties_by_token_id():
    logits = torch.zeros(1, 600)
    drawn = {choose(logits, state(temperature=1.0, top_k=3, seed=seed))[0] for seed in range(60)}

    assert drawn == {0, 1, 2}


def test_flat_distributions_are_filtered_beyond_the_first_candidates():
    logits = torch.zeros(1, 1000)
    drawn = [choose(logits, state(temperature=1.0, top_p=0.9, seed=s))[0] for s in range(400)]

    assert 800 < max(drawn) < 900


def test_tokens_are_drawn_as_often_as_they_are_probable():
    logits = torch.tensor([[0.5, 1.5, -1.0, 0.0]])
    counts = Counter(choose(logits, state(temperature=1.0, seed=seed))[0] for seed in range(1500))
    expected = logits.softmax(-1)[0] * 1500

    assert all(abs(counts[i] - expected[i]) < 4 * expected[i] ** 0.5 for i in range(4))


def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    logits = random_logits(8, seed=3)
    states = [
        state(temperature=0.7 * (i % 3), top_k=5 * (i % 2), seed=i, repetition_penalty=1.0 + i / 9)
        for i in range(8)
    ]
    alone = [choose(logits[i : i + 1], states[i])[0] for i in range(8)]

    assert choose(logits, *states) == alone
    assert choose(logits.flip(0), *states[::-1]) == alone[::-1]


def test_randomness_is_a_function_of_seed_index_and_position():
    def draw(*, seed=5, index=0, completion=(), prompt=(1, 2, 3)):
        return state(index, completion, prompt, temperature=1.0, seed=seed).uniform()

    assert draw() == draw(prompt=(9, 9, 9))
    assert draw(completion=(4,)) == draw(prompt=(1, 2, 3, 4))
    assert len({draw(), draw(seed=6), draw(index=1), draw(completion=(4,)), draw(seed=-1)}) == 5
    assert draw() == 0.4993265735963671  # for ever: seeds that clients keep must go on to work


def test_penalties_count_as_vllm_does():
    logits = torch.tensor([[2.0, 2.0, 2.0, -2.0, 2.0]])
    sampler = state(
        prompt=(0, 3), completion=(1, 1, 3), output=Output(logprobs=5),
        repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5,
        logit_bias=((4, 1.0),),
    )  # fmt: skip
    # repetition: tokens 0, 1, 3; frequency and presence: 1 twice, 3 once; bias comes first
    adjusted = torch.tensor([1.0, 1.0 - 0.5 - 0.5, 2.0, -4.0 - 0.25 - 0.5, 3.0])
    (choice,) = sample(logits, [sampler])

    assert choice.token_id == 4
    expected = adjusted.log_softmax(-1)
    assert [i for i, _ in choice.logprob.top] == [4, 2, 0, 1, 3]
    for token_id, logprob in choice.logprob.top:
        assert logprob == pytest.approx(float(expected[token_id]), abs=1e-6)


def test_a_bias_on_a_seen_token_is_penalised_with_it():
    logits = torch.tensor([[0.0, 3.0]])
    sampler = state(prompt=(0,), repetition_penalty=2.0, logit_bias=((0, 5.0),))

    assert choose(logits, sampler) == [1]


def test_counting_token_by_token_equals_counting_at_once():
    tokens = [int(t) for t in torch.randint(0, 300, (500,), generator=torch.manual_seed(1))]
    settings = {"repetition_penalty": 1.3, "frequency_penalty": 0.1, "presence_penalty": 0.2}
    at_once = state(completion=tokens, **settings)
    stepwise = state(**settings)
    for token in tokens:
        stepwise.append(token)
    logits = random_logits()
    first, second = logits[0].clone(), logits[0].clone()
    at_once.adjust_(first)
    stepwise.adjust_(second)
    assert first.equal(second)


def test_ending_ids_are_masked_until_min_tokens_are_out():
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    stopping = Stopping(max_tokens=9, min_tokens=2, eos_token_ids=(1,))

    assert choose(logits, state(stopping=stopping)) == [2]
    assert choose(logits, state(stopping=stopping, completion=(0,))) == [2]
    assert choose(logits, state(stopping=stopping, completion=(0, 0))) == [1]


def test_sampling_leaves_logits_and_states_as_they_are():
    logits = random_logits()
    before = logits.clone()
    sampler = state(temperature=1.0, repetition_penalty=1.5, logit_bias=((3, 2.0),))

    assert sample(logits, [sampler]) == sample(logits, [sampler])
    assert logits.equal(before)


def test_logprobs_come_before_temperature_and_filters():
    logits = random_logits()
    expected = logits[0].log_softmax(-1)
    (choice,) = sample(logits, [state(temperature=0.3, top_k=4, output=Output(logprobs=3), seed=3)])

    assert choice.logprob.token_id == choice.token_id
    assert choice.logprob.logprob == pytest.approx(float(expected[choice.token_id]), abs=1e-5)
    assert [i for i, _ in choice.logprob.top] == expected.topk(3).indices.tolist()


def test_prompt_scores_are_the_models_own_logprobs():
    logits = random_logits(150)
    tokens = list(range(150))
    scores = score(logits, tokens, 2)
    expected = logits.log_softmax(-1)

    assert [s.token_id for s in scores] == tokens
    assert [s.logprob for s in scores] == pytest.approx(
        expected.diagonal()[:150].tolist(), abs=1e-5
    )
    assert [s.top[0][0] for s in scores] == expected.argmax(-1).tolist()
    assert score(logits[:0], [], 2) == []


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nonsense_logits_are_an_error(wrong, temperature):
    logits = torch.full((1, 8), wrong)

    with pytest.raises(ValueError, match="nonsense"):
        sample(logits, [state(temperature=temperature)])


def test_a_greedy_margin_is_the_distance_to_the_other_token():
    logits = torch.tensor([[1.0, 4.0, 3.5]])

    (same,) = sample(logits, [state()], emitted=[1])
    (other,) = sample(logits, [state()], emitted=[0])
    assert (same.token_id, same.margin) == (1, 0.5)
    assert (other.token_id, other.margin) == (1, 3.0)


def test_a_drawn_margin_is_the_distance_to_the_emitted_tokens_interval():
    logits = torch.tensor([[0.3, 0.2, 0.1, 0.4]]).log()
    sampler = next(
        s for s in (state(temperature=1.0, seed=i) for i in range(99)) if 0.52 < s.uniform() < 0.55
    )
    u = sampler.uniform()

    margins = [sample(logits, [sampler], emitted=[i])[0].margin for i in range(4)]
    assert choose(logits, sampler) == [2]
    assert margins == pytest.approx([u - 0.3, u - 0.5, min(u - 0.5, 0.6 - u), 0.6 - u], abs=1e-6)


def test_filter_margins_tell_how_close_a_filter_cuts():
    logits = torch.tensor([[0.5, 0.26, 0.24]]).log()

    def margin(emitted=0, **settings):
        return sample(logits, [state(temperature=1.0, **settings)], emitted=[emitted])[0]

    assert margin(top_k=2).filter_margin == pytest.approx(0.04, abs=1e-6)  # relative to the largest
    assert margin(top_p=0.7).filter_margin == pytest.approx(0.06, abs=1e-6)
    assert margin(min_p=0.5).filter_margin == pytest.approx(0.02, abs=1e-6)
    assert margin().filter_margin == math.inf
    assert margin(2, top_k=2).margin == math.inf
