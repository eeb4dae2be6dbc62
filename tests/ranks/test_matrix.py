"""Every T x N arrangement gives the reference's tokens, by teacher forcing.

`make test` holds a sample; `make test-full` and `make accept-parity` hold all of it. A mismatch at
a printed margin is allowed, except in bit-stable mode at the T of the reference.
"""

import pytest

from tests.conformance.harness_model import published, write_oracle
from tests.ranks.harness_gateway import (
    Experts,
    Gateway,
    Reference,
    mixed_requests,
    options_for,
)
from workers.dispatch.options import DispatchOptions

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(400)]

SAMPLE = {(4, 3), (2, 5)}
TOKENS = 64


def arrangement(ranks: int, workers: int):
    marks = () if (ranks, workers) in SAMPLE else (pytest.mark.full,)
    return pytest.param(ranks, workers, marks=marks, id=f"T{ranks}-N{workers}")


MATRIX = [arrangement(t, n) for t in (1, 2, 4) for n in (0, 1, 2, 3, 5)]


@pytest.fixture(scope="module")
def reference():
    return Reference()


def serve(ranks: int, workers: int, requests, *, bit_stable: bool = False, apart: bool = False):
    """Return the answers of one arrangement, all requests together or one after the other."""
    options = options_for(
        local_experts=workers == 0,
        bit_stable=bit_stable,
        micro_batches=2 if workers else 1,
        dispatch=DispatchOptions(bit_stable=bit_stable),
    )
    gateway = Gateway(ranks, options)
    experts = Experts(workers, bit_stable=bit_stable) if workers else None
    try:
        if experts is None:
            gateway.start()
        else:
            experts.serve(gateway)
        if not apart:
            return gateway.ranks[0]("generate", requests)
        answers = {}
        for request in requests:
            answers |= gateway.ranks[0]("generate", [request])
        return answers
    finally:
        gateway.close()
        if experts is not None:
            experts.close()


@pytest.mark.parametrize(("ranks", "workers"), MATRIX)
def test_greedy_and_seeded_tokens_are_right_in_every_arrangement(reference, ranks, workers) -> None:
    requests = mixed_requests(16 if workers else 8, longest=TOKENS)

    reports = reference.check(requests, serve(ranks, workers, requests))

    print(f"T={ranks} N={workers}: {sum(len(r.mismatches) for r in reports)} explained mismatches")


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 2, 5])
def test_bit_stable_tokens_are_the_references_with_none_explained(workers) -> None:
    requests = mixed_requests(16, longest=TOKENS)

    reports = Reference(bit_stable=True).check(
        requests, serve(1, workers, requests, bit_stable=True)
    )

    assert not any(report.mismatches for report in reports)


@pytest.mark.full
def test_requests_together_and_one_by_one_are_the_same_in_bit_stable_mode() -> None:
    requests = mixed_requests(16, longest=TOKENS)

    together = serve(1, 2, requests, bit_stable=True)

    assert serve(1, 2, requests, bit_stable=True, apart=True) == together


def test_a_model_with_the_published_vocabulary_runs_on_four_ranks(tmp_path) -> None:
    write_oracle(tmp_path, published(vocab_size=248_320))
    requests = mixed_requests(3, longest=6)
    gateway = Gateway(4, options_for(), model_dir=tmp_path)
    try:
        gateway.start()
        answers = gateway.ranks[0]("generate", requests)
    finally:
        gateway.close()

    Reference(model_dir=tmp_path).check(requests, answers)
