"""The expert worker: slots change while calls go on, gateways come and go, nothing is lost."""

import threading
import time

import pytest
import torch

from tests.ranks.harness_dispatch import (
    DEADLINE_S,
    HIDDEN,
    HOST,
    LAYERS,
    Cluster,
    Experts,
    all_experts,
    close_to,
    gating,
)
from workers.clock import SystemClock
from workers.dispatch.exchange import DispatchOptions, LinkDispatcher, MessageShape
from workers.dispatch.header import OLDEST_VERSION, VERSION
from workers.errors import PlacementError
from workers.expert.worker import ExpertWorker, WorkerOptions
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.placement import (
    ExpertId,
    Member,
    MemberId,
    MemberState,
    Placement,
    Replica,
    Role,
    View,
)

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

WORKER, GATEWAY = MemberId("worker", 1), MemberId("gateway", 1)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return Experts(tmp_path_factory.mktemp("experts"), num_experts=5, top_k=2)


def make_worker(experts, num_slots=LAYERS * 5, **options):
    return ExpertWorker(
        WORKER,
        config=ModelConfig.load(experts.directory),
        checkpoint=Checkpoint(experts.directory),
        num_slots=num_slots,
        options=WorkerOptions(**options),
        host=HOST,
        clock=SystemClock(),
    )


def make_dispatcher(experts, shape=None, **options):
    shape = shape or MessageShape(hidden_size=HIDDEN, top_k=experts.top_k, dtype=torch.float32)
    return LinkDispatcher(
        GATEWAY, 0, shape=shape, options=DispatchOptions(**options), host=HOST, clock=SystemClock()
    )


def make_view(experts, held, store, version=1):
    members = (
        Member(id=GATEWAY, role=Role.GATEWAY, state=MemberState.ACTIVE, stores=(store,)),
        Member(id=WORKER, role=Role.EXPERT_WORKER, state=MemberState.ACTIVE),
    )
    replicas = {expert: (Replica(WORKER, slot),) for expert, slot in held.items()}
    return View(1, version, members, Placement("test", LAYERS, experts.num_experts, replicas))


@pytest.fixture
def pair(experts):
    """A worker with all experts and a dispatcher to it, in this process."""
    worker, dispatcher = (
        make_worker(experts, num_slots=12),
        make_dispatcher(experts, stale_retry_s=0.02),
    )
    held = {expert: slot for slot, expert in enumerate(all_experts(5))}
    worker.load(held)
    worker.start()
    view = make_view(experts, held, dispatcher.store_address)
    worker.adopt(view)
    dispatcher.adopt(view)
    dispatcher.wait_ready(DEADLINE_S)
    yield worker, dispatcher
    dispatcher.close()
    worker.close()


def check(dispatcher, experts, num_rows, layer=0, seed=0):
    x, ids, weights = gating("random", num_rows, experts, seed)
    y = dispatcher.combine(dispatcher.dispatch(layer, x, ids, weights))
    assert close_to(y, experts.dense(layer, x, ids, weights))


def wait_until(condition, timeout_s=DEADLINE_S):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_it_counts_what_it_does(pair, experts):
    worker, dispatcher = pair
    for seed in range(5):
        check(dispatcher, experts, 4, seed=seed)
    stats = worker.stats()
    assert (stats.slots_used, stats.slots_total, stats.links) == (10, 12, 1)
    assert (stats.calls, stats.rows, stats.pairs) == (5, 20, 40)
    assert stats.stale_answers == 0
    assert stats.compute_s > 0
    assert stats.queue_age_s == 0


def test_slots_are_overwritten_while_calls_go_on(pair, experts):
    """Two experts change places all the time; rows for the one that is away are asked again."""
    worker, dispatcher = pair
    stop = threading.Event()
    moves = []

    def move():
        a, b = ExpertId(0, 1), ExpertId(0, 3)
        while not stop.is_set():
            worker.load({a: 10, b: 11})
            worker.load({a: 11, b: 10})
            moves.append(1)

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for seed in range(25):
            check(dispatcher, experts, 6, seed=seed)
    finally:
        stop.set()
        mover.join(DEADLINE_S)
    assert moves
    assert worker.stats().slots_used == 10


def test_loading_what_is_there_already_reads_nothing(pair):
    worker, _ = pair
    checkpoint = worker._checkpoint
    before = checkpoint.bytes_read
    worker.load(dict(worker.held()))
    assert checkpoint.bytes_read == before


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ({ExpertId(0, 5): 0}, "does not exist"),
        ({ExpertId(LAYERS, 0): 0}, "does not exist"),
        ({ExpertId(0, 0): 2}, "slot 2 of 2"),
        ({ExpertId(0, 0): 1, ExpertId(0, 1): 1}, "one slot"),
    ],
)
def test_an_impossible_assignment_is_refused_whole(experts, assignment, reason):
    worker = make_worker(experts, num_slots=2)
    with pytest.raises(PlacementError, match=reason):
        worker.load({ExpertId(1, 1): 0} | assignment)
    assert not worker.held()
    worker.close()


@pytest.mark.parametrize(
    "shape",
    [
        MessageShape(hidden_size=HIDDEN + 1, top_k=2, dtype=torch.float32),
        MessageShape(hidden_size=HIDDEN, top_k=3, dtype=torch.float32),
        MessageShape(hidden_size=HIDDEN, top_k=2, dtype=torch.bfloat16),
    ],
)
def test_a_gateway_with_other_rows_gets_no_link(experts, shape):
    worker, dispatcher = make_worker(experts), make_dispatcher(experts, shape)
    held = {ExpertId(0, 0): 0}
    worker.load(held)
    worker.start()
    view = make_view(experts, held, dispatcher.store_address)
    worker.adopt(view)
    dispatcher.adopt(view)
    time.sleep(0.3)
    assert dispatcher.stats()["links"] == 0
    assert worker.stats().links == 0
    dispatcher.close()
    worker.close()


def test_longer_messages_than_it_accepts_get_no_link(experts):
    worker, dispatcher = make_worker(experts, capacity_rows=32), make_dispatcher(experts)
    view = make_view(experts, {}, dispatcher.store_address)
    worker.adopt(view)
    dispatcher.adopt(view)
    time.sleep(0.3)
    assert dispatcher.stats()["links"] == 0
    dispatcher.close()
    worker.close()


def test_calls_that_come_before_the_start_wait_for_it(experts):
    worker, dispatcher = make_worker(experts), make_dispatcher(experts)
    held = {expert: slot for slot, expert in enumerate(all_experts(5))}
    worker.load(held)
    view = make_view(experts, held, dispatcher.store_address)
    worker.adopt(view)
    dispatcher.adopt(view)
    dispatcher.wait_ready(DEADLINE_S)
    x, ids, weights = gating("random", 3, experts)
    handle = dispatcher.dispatch(0, x, ids, weights)
    wait_until(lambda: worker.stats().queue_age_s > 0)
    worker.start()
    assert close_to(dispatcher.combine(handle), experts.dense(0, x, ids, weights))
    dispatcher.close()
    worker.close()


def test_a_draining_worker_serves_on_until_no_calls_come(pair, experts):
    worker, dispatcher = pair
    check(dispatcher, experts, 3)
    outcome = []
    drainer = threading.Thread(target=lambda: outcome.append(worker.drain(DEADLINE_S)))
    drainer.start()
    for seed in range(10):
        check(dispatcher, experts, 3, seed=seed)
        time.sleep(0.02)
    drainer.join(DEADLINE_S)
    assert outcome == [True]


def test_draining_ends_by_its_deadline_and_goes_on_serving(pair, experts):
    worker, dispatcher = pair
    check(dispatcher, experts, 3)
    assert not worker.drain(0.0)
    check(dispatcher, experts, 3)


def test_what_waits_meanwhile_is_computed_together(experts):
    """While one long batch computes, calls of several gateways gather into the next."""
    cluster = Cluster(experts)
    try:
        cluster.add_worker("worker-0", all_experts(5))
        dispatchers = [cluster.add_dispatcher() for _ in range(3)]
        cluster.ready()
        x, ids, weights = gating("random", 500, experts)
        wanted = experts.dense(0, x[:4], ids[:4], weights[:4])
        for _ in range(20):
            handles = [dispatchers[0].dispatch(0, x, ids, weights)]
            handles += [d.dispatch(0, x[:4], ids[:4], weights[:4]) for d in dispatchers[1:]]
            results = [d.combine(h) for d, h in zip(dispatchers, handles, strict=True)]
            assert all(close_to(y[:4], wanted) for y in results)
        stats = cluster.workers["worker-0"].call("stats")
        assert stats.calls == 60
        assert stats.batches < 60
    finally:
        cluster.close()


def test_a_gateway_that_is_gone_from_the_view_loses_its_link(pair, experts):
    worker, dispatcher = pair
    placement = Placement("test", LAYERS, experts.num_experts, {})
    worker.adopt(View(1, 2, (), placement))
    wait_until(lambda: worker.stats().links == 0)
    assert dispatcher.stats()["links_opened"] == 1


def test_a_link_that_the_worker_drops_is_opened_again(pair, experts):
    worker, dispatcher = pair
    for served in list(worker._followers._served):
        served.link.close()
    for seed in range(5):
        check(dispatcher, experts, 5, seed=seed)
    assert dispatcher.stats()["links_opened"] == 2


def test_a_failure_while_computing_closes_the_links_and_is_told(pair, experts):
    worker, dispatcher = pair

    def fail(*_):
        raise MemoryError("no room")

    worker._shard.forward = fail
    x, ids, weights = gating("random", 3, experts)
    dispatcher.dispatch(0, x, ids, weights)
    wait_until(lambda: worker.failure)
    assert "no room" in worker.failure
    wait_until(lambda: worker.stats().links == 0)


@pytest.mark.parametrize("spoken", [OLDEST_VERSION, VERSION])
def test_a_worker_that_speaks_an_older_version_is_spoken_to_in_it(experts, monkeypatch, spoken):
    monkeypatch.setattr("workers.expert.worker.VERSION", spoken)
    worker, dispatcher = make_worker(experts, num_slots=10), make_dispatcher(experts)
    held = {expert: slot for slot, expert in enumerate(all_experts(5))}
    worker.load(held)
    worker.start()
    view = make_view(experts, held, dispatcher.store_address)
    try:
        worker.adopt(view)
        dispatcher.adopt(view)
        dispatcher.wait_ready(DEADLINE_S)
        check(dispatcher, experts, 4)
        (peer,) = dispatcher._links.peers.values()
        assert peer.open.link.terms.version == spoken
    finally:
        dispatcher.close()
        worker.close()
