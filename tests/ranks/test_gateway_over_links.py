import threading

import pytest

from tests.ranks.harness_gateway import (
    Experts,
    Gateway,
    Reference,
    mixed_requests,
    options_for,
)
from workers.dispatch.options import DispatchOptions

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def reference():
    return Reference()


def test_two_ranks_and_two_expert_workers_give_the_models_tokens(reference):
    gateway, experts = Gateway(2, options_for(local_experts=False, micro_batches=2)), Experts(2)
    requests = mixed_requests(16, longest=9)
    try:
        experts.serve(gateway)
        answers = gateway.ranks[0]("generate", requests)
        stats = gateway.all("call", "stats")
        workers = [worker("call", "stats") for worker in experts.workers]
    finally:
        gateway.close()
        experts.close()

    reference.check(requests, answers)
    assert (stats[0].kv_blocks_used, stats[0].state_blocks_used) == (0, 0)
    for rank in stats:
        assert set(rank.rows_by_worker) == {str(member) for member in experts.members}
        assert all(rows > 0 for rows in rank.rows_by_worker.values())
    assert all(worker.pairs > 0 and worker.links == 2 for worker in workers)


def test_bit_stable_tokens_do_not_depend_on_where_experts_live():
    options = options_for(
        local_experts=False, bit_stable=True, dispatch=DispatchOptions(bit_stable=True)
    )
    gateway, experts = Gateway(1, options), Experts(2, bit_stable=True)
    requests = mixed_requests(7, longest=6)
    try:
        experts.serve(gateway)
        answers = gateway.ranks[0]("generate", requests)
    finally:
        gateway.close()
        experts.close()

    reports = Reference(bit_stable=True).check(requests, answers)
    assert not any(report.mismatches for report in reports)


def test_the_death_of_an_expert_worker_changes_no_token(reference):
    gateway, experts = Gateway(1, options_for(local_experts=False)), Experts(2, floor=2)
    requests = mixed_requests(8, longest=30)
    try:
        experts.serve(gateway)
        gateway.ranks[0].send("generate", requests)
        threading.Event().wait(1.0)  # into the midst of it; right wherever it falls
        experts.workers[0].kill()
        answers = gateway.ranks[0].result()
        failure = gateway.ranks[0]("read", "failure")
    finally:
        gateway.close()
        experts.close()

    assert failure is None
    reference.check(requests, answers)


def test_steps_that_fail_while_rows_are_out_are_taken_again(reference):
    gateway, experts = Gateway(1, options_for(local_experts=False)), Experts(2)
    requests = mixed_requests(6, longest=12)
    try:
        experts.serve(gateway)
        gateway.ranks[0]("fail_combines", 37)  # a step combines once a layer
        answers = gateway.ranks[0]("generate", requests)
        stats = gateway.ranks[0]("wait_until_free")
    finally:
        gateway.close()
        experts.close()

    reference.check(requests, answers)
    assert (stats.kv_blocks_used, stats.state_blocks_used) == (0, 0)
