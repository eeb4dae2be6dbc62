import math

import pytest
import torch

from tests.unit.harness_gateway import (
    VOCAB_SIZE,
    HistoryModel,
    expected_tokens,
    history_logits,
    make_request,
)
from workers.gateway.replay import EXACT, Tolerance, replay
from workers.model.gate import GateProbe


class ReplayModel(HistoryModel):
    """The history model with the decoder's signature, and a gate whose margins are given."""

    def __init__(self, probe=None, margins=()):
        super().__init__(block_tokens=4)
        self.probe, self.margins = probe, dict(margins)

    def forward(self, batch, cache):
        assert cache is self
        (segment,) = batch.segments
        if self.probe is not None:
            self.probe.begin(batch.num_rows)
            for row in range(batch.num_rows):
                margin = self.margins.get(segment.start + row, math.inf)
                self.probe.margins_LN[1, row] = margin
        return super().forward(batch)


def run(request, tokens, *, index=0, margins=(), **settings):
    probe = GateProbe(num_layers=2)
    model = ReplayModel(probe, margins)
    return model, replay(model, model, request, index, tokens, probe=probe, **settings)


@pytest.mark.parametrize("bit_stable", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_the_sampler_chose_is_right(bit_stable, temperature):
    request = make_request(
        prompt=tuple(range(1, 40)) * 2, max_tokens=20, temperature=temperature, seed=2,
        num_sequences=2, repetition_penalty=1.3,
    )  # fmt: skip
    _, report = run(request, expected_tokens(request, 1), index=1, bit_stable=bit_stable)

    assert report.is_right
    assert (report.num_tokens, report.mismatches) == (20, ())
    assert (report.request_id, report.sequence_index) == ("r", 1)


def test_a_wrong_token_is_listed_and_the_rest_is_judged_from_it():
    request = make_request(max_tokens=6)
    tokens = expected_tokens(request)
    wrong = (tokens[2] + 1) % VOCAB_SIZE
    tokens[2] = wrong
    forced = [*tokens[:3]]
    while len(forced) < 6:
        forced.append(int(history_logits((1, 2, 3, *forced)).argmax()))
    _, report = run(request, forced)
    (mismatch,) = report.mismatches

    logits = history_logits((1, 2, 3, *tokens[:2]))
    assert (mismatch.index, mismatch.emitted) == (2, wrong)
    assert mismatch.chosen == int(logits.argmax())
    assert mismatch.margin == pytest.approx(float(logits.max() - logits[wrong]))
    assert not report.is_right


def test_a_near_tie_explains_a_token_unless_nothing_may_be_explained():
    request = make_request(max_tokens=1)
    second = int(history_logits((1, 2, 3)).topk(2).indices[1])
    gap = float(torch.diff(history_logits((1, 2, 3)).topk(2).values).abs())
    close, far = Tolerance(logit=gap * 1.01), Tolerance(logit=gap * 0.99)

    assert run(request, [second], tolerance=close)[1].is_right
    assert not run(request, [second], tolerance=far)[1].is_right
    assert not run(request, [second], bit_stable=True)[1].is_right


def test_a_gate_margin_explains_what_comes_at_its_position_and_after():
    request = make_request(prompt=(1, 2, 3), max_tokens=4)
    tokens = [(t + 1) % VOCAB_SIZE for t in expected_tokens(request)]
    _, report = run(request, tokens, margins={4: 1e-9})
    explained = {m.index: m.is_explained for m in report.mismatches}

    assert explained[0] is explained[1] is False  # they came from positions 2 and 3
    assert all(explained[i] for i in explained if i >= 2)
    exact = run(request, tokens, margins={4: 1e-9}, tolerance=EXACT)[1]
    assert not any(m.is_explained for m in exact.mismatches)


def test_bit_stable_work_is_cut_as_the_engine_cuts_it():
    request = make_request(prompt=tuple(range(1, 50)) * 3, max_tokens=4)
    model, _ = run(request, expected_tokens(request), bit_stable=True)
    cuts = [(s.start, len(s.token_ids)) for batch in model.batches for s in batch.segments]

    assert cuts == [(0, 64), (64, 64), (128, 19), (147, 1), (148, 1), (149, 1)]
