import os
import signal

import pytest

from tests.ranks.harness_gateway import Gateway, Reference, mixed_requests, options_for
from workers.errors import DrainingError, DuplicateRequestError, InvalidRequestError

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", params=[1, 2], ids=["T=1", "T=2"])
def gateway(request):
    gateway = Gateway(request.param, options_for())
    gateway.start()
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def reference():
    return Reference()


def blocks_used(stats):
    return (stats.kv_blocks_used, stats.state_blocks_used, stats.running, stats.waiting)


def test_sixteen_requests_together_and_one_by_one_are_right(gateway, reference):
    requests = mixed_requests(16, longest=9)
    together = gateway.ranks[0]("generate", requests)
    alone = {}
    for request in requests[::3]:
        alone.update(gateway.ranks[0]("generate", [request]))

    reference.check(requests, together)
    reference.check(requests[::3], alone)
    assert blocks_used(gateway.ranks[0]("call", "stats")) == (0, 0, 0, 0)


def test_an_abort_and_a_broken_sink_free_their_blocks(gateway):
    rank = gateway.ranks[0]
    (request,) = mixed_requests(1, longest=300)
    rank("begin", request)
    assert rank("call", "stats").kv_blocks_used > 0
    with pytest.raises(AssertionError, match=DuplicateRequestError.__name__):
        rank("begin", request)
    rank("call", "abort", request.request_id)
    assert blocks_used(rank("wait_until_free")) == (0, 0, 0, 0)
    rank("submit_to_broken_sink", request)
    assert blocks_used(rank("wait_until_free")) == (0, 0, 0, 0)


def test_wrong_requests_are_refused_at_once(gateway):
    (request,) = mixed_requests(1, longest=500)

    with pytest.raises(AssertionError, match=InvalidRequestError.__name__):
        gateway.ranks[0]("begin", request)


def test_all_ranks_are_ready_and_idle_ranks_stay_so(gateway):
    assert gateway.all("read", "ready") == [True] * len(gateway.ranks)
    assert gateway.all("read", "failure") == [None] * len(gateway.ranks)


def test_memory_is_shared_among_the_ranks(gateway):
    size = len(gateway.ranks)

    assert [report.kv_bytes * size for report in gateway.memory] == [
        2 * 200 * 16 * 2 * 2 * 64 * 4  # layers, blocks, tokens, keys and values, heads, size, fp32
    ] * size
    assert all(report.experts_bytes > report.weights_bytes for report in gateway.memory)


def test_bit_stable_tokens_are_exact_also_under_preemption():
    options = options_for(bit_stable=True, step_tokens=80, block_tokens=4, num_kv_blocks=60)
    gateway = Gateway(1, options)
    gateway.start()
    requests = mixed_requests(8, longest=18)
    try:
        answers = gateway.ranks[0]("generate", requests)
        preemptions = gateway.ranks[0]("call", "stats").preemptions
    finally:
        gateway.close()

    assert preemptions > 0
    reports = Reference(bit_stable=True).check(requests, answers)
    assert not any(report.mismatches for report in reports)


@pytest.mark.parametrize("size", [1, 2])
def test_draining_finishes_what_runs_and_refuses_the_rest(size):
    gateway = Gateway(size, options_for())
    gateway.start()
    first, second = mixed_requests(2, longest=30)
    try:
        gateway.ranks[0]("begin", first)
        for rank in gateway.ranks:
            rank.send("call", "drain", 60.0)
        assert gateway.ranks[0].result()
        assert blocks_used(gateway.ranks[0]("call", "stats")) == (0, 0, 0, 0)
        with pytest.raises(AssertionError, match=DrainingError.__name__):
            gateway.ranks[0]("begin", second)
        gateway.ranks[0]("call", "close")
        assert all(rank.result() for rank in gateway.ranks[1:])
    finally:
        gateway.close()


@pytest.mark.parametrize("dead", [0, 1])
def test_the_death_of_a_rank_ends_the_gateway(dead):
    gateway = Gateway(2, options_for())
    gateway.start()
    try:
        gateway.ranks[0]("begin", mixed_requests(1, longest=300)[0])
        gateway.ranks[dead].kill()
        survivor = gateway.ranks[1 - dead]

        assert survivor("wait_for_failure")
        assert survivor("read", "ready") is False
    finally:
        gateway.close()


def test_a_frozen_rank_is_noticed_while_another_is_in_a_collective():
    gateway = Gateway(2, options_for(sibling_silence_s=1.0, group_timeout_s=600.0))
    gateway.start()
    try:
        gateway.ranks[0]("begin", mixed_requests(1, longest=300)[0])
        os.kill(gateway.ranks[1].process.pid, signal.SIGSTOP)
        failure = gateway.ranks[0]("wait_for_failure")
        assert failure == "rank 1 of this gateway is silent for 1 s"
    finally:
        gateway.close()


def test_closing_rank_0_lets_the_others_end():
    gateway = Gateway(2, options_for())
    gateway.start()
    try:
        gateway.all("call", "close")
        assert gateway.all("read", "failure") == [None, None]
    finally:
        gateway.close()
