"""Which experts are chosen, and how near another choice was."""

import pytest
import torch

from workers.model.gate import GateProbe, TopKGate


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_weights_are_the_renormalised_probabilities_of_the_best() -> None:
    logits = torch.randn(5, 9) * 3
    best, ids = logits.softmax(-1).topk(3, -1)

    chosen, weights = TopKGate(3)(logits)

    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, best / best.sum(-1, keepdim=True))


def test_all_experts_may_be_chosen_and_far_logits_do_not_overflow() -> None:
    ids, weights = TopKGate(2)(torch.tensor([[-1e30, 200.0]]))

    assert ids.tolist() == [[1, 0]]
    assert weights.tolist() == [[1.0, 0.0]]


def test_no_rows_give_no_choices() -> None:
    ids, weights = TopKGate(2)(torch.empty(0, 4))

    assert ids.shape == weights.shape == (0, 2)


def test_the_probe_records_margins_by_row_of_the_batch() -> None:
    probe = GateProbe(num_layers=2)
    probe.begin(3)
    logits = torch.tensor([[0.1, 0.4, 0.5], [0.2, 0.2, 0.6]]).log()

    probe.record(1, [2, 0], logits, 2)

    torch.testing.assert_close(probe.margins_LN[1, [2, 0]], torch.tensor([0.3, 0.0]))
    assert probe.margins_LN[0].isinf().all()
    assert probe.margins_LN[1, 1].isinf()


def test_the_probe_sees_no_other_choice_where_all_experts_are_chosen() -> None:
    probe = GateProbe(num_layers=1)
    probe.begin(1)

    probe.record(0, [0], torch.randn(1, 4), 4)

    assert probe.margins_LN[0, 0].isinf()
