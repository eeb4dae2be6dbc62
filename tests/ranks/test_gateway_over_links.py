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
from workers.types import FinishReason

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


def test_a_request_that_expert_workers_end_by_fails_alone(reference):
    """On two ranks, of which one finds out; a worker that ends is replaced by one that waits."""
    gateway, experts = Gateway(2, options_for(local_experts=False)), Experts(9, floor=9)
    requests = mixed_requests(6, longest=9)
    guilty = requests[2]
    row = reference.row_of(guilty.prompt_token_ids[:40], layer=1)
    gone, warm = [], experts.members[2:]
    try:
        for worker in experts.workers:
            worker("die_of", row)
        experts.serve(gateway, warm=warm)
        gateway.ranks[0]("submit_all", requests)
        while (answers := gateway.ranks[0]("answers")) is None:
            ended = [
                member
                for member, worker in zip(experts.members, experts.workers, strict=True)
                if member not in gone and not worker.process.is_alive()
            ]
            gone, warm = gone + ended, warm[len(ended) :]
            view = experts.view(gateway, gone=gone, warm=warm, version=1 + len(gone))
            gateway.all("call", "adopt", view)
        failure = gateway.ranks[0]("read", "failure")
        stats = gateway.ranks[0]("wait_until_free")
    finally:
        gateway.close()
        experts.close()

    print(f"{len(gone)} workers ended")
    assert failure is None
    assert answers.pop((guilty.request_id, 0)).finish is FinishReason.ERROR
    reference.check([r for r in requests if r is not guilty], answers)
    assert (stats.kv_blocks_used, stats.state_blocks_used) == (0, 0)


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
