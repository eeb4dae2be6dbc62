"""The contract of a dispatcher, over links to workers that are killed, frozen and wrong."""

import signal
import threading
import time

import pytest
import torch

from tests.ranks.harness_dispatch import (
    DEADLINE_S,
    LAYERS,
    POISON,
    Cluster,
    Experts,
    all_experts,
    close_to,
    gating,
    spread,
)
from workers.dispatch.exchange import DispatchOptions
from workers.dispatch.local import LocalDispatcher
from workers.errors import DeadlineError, LinkClosedError
from workers.model.experts import ExpertShard
from workers.model.layers import ROW_TILE
from workers.model.parameters import ExpertParameters
from workers.placement import ExpertId, MemberState

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(180)]

KINDS = ("random", "hot", "same")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return Experts(tmp_path_factory.mktemp("experts"), num_experts=7, top_k=3)


@pytest.fixture
def cluster(experts):
    cluster = Cluster(experts)
    yield cluster
    cluster.close()


def start(cluster, num_workers, copies=1, options=None, **worker_options):
    """Start workers that hold all experts, and one dispatcher to them."""
    for i, held in enumerate(spread(cluster.experts.num_experts, num_workers, copies)):
        cluster.add_worker(f"worker-{i}", held, **worker_options)
    dispatcher = cluster.add_dispatcher(options)
    cluster.ready()
    return dispatcher


def check(dispatcher, experts, kind, num_rows, layer=0, seed=0):
    """One round trip, against the dense result."""
    x, ids, weights = gating(kind, num_rows, experts, seed)
    y = dispatcher.combine(dispatcher.dispatch(layer, x, ids, weights))
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert close_to(y, experts.dense(layer, x, ids, weights)), (kind, num_rows, seed)


def in_thread(body):
    """Run in a thread; returns a function that waits for the result."""
    results = []

    def run():
        try:
            results.append((body(), None))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(timeout_s=DEADLINE_S):
        thread.join(timeout_s)
        assert not thread.is_alive()
        value, error = results[0]
        if error is not None:
            raise error
        return value

    result.running = thread.is_alive
    return result


def wait_until(condition, timeout_s=DEADLINE_S):
    """Wait for something that another process brings about."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(("num_workers", "copies"), [(1, 1), (3, 1), (3, 2), (2, 2)])
def test_rows_come_back_right_for_any_gating_and_number_of_workers(
    cluster, experts, num_workers, copies
):
    options = DispatchOptions(
        capacity_rows=32, num_buffers=2, min_deadline_s=10, first_deadline_s=10
    )
    dispatcher = start(cluster, num_workers, copies, options)
    for kind in KINDS:
        for num_rows in (0, 1, 5, 32, 33, 300):
            for layer in range(LAYERS):
                check(dispatcher, experts, kind, num_rows, layer)
    stats = dispatcher.stats()
    assert stats["links"] == num_workers
    assert stats["resends"] == stats["late_replies"] == stats["stale_answers"] == 0


def test_two_micro_batches_are_open_at_once_and_combined_in_any_order(cluster, experts):
    dispatcher = start(cluster, 2, options=DispatchOptions(capacity_rows=32, num_buffers=2))
    for seed in range(4):
        calls = []
        for num_rows in (200, 7, 90):
            x, ids, weights = gating("random", num_rows, experts, seed)
            calls.append((dispatcher.dispatch(0, x, ids, weights), (x, ids, weights)))
        for handle, (x, ids, weights) in reversed(calls) if seed % 2 else calls:
            assert handle.num_rows == len(x)
            assert close_to(dispatcher.combine(handle), experts.dense(0, x, ids, weights))


def test_calls_of_a_failed_step_are_dropped_with_their_handles(cluster, experts):
    dispatcher = start(cluster, 2, options=DispatchOptions(capacity_rows=32, num_buffers=2))
    for seed in range(30):
        handles = [
            dispatcher.dispatch(layer, *gating("random", 200, experts, seed)) for layer in (0, 1)
        ]
        if seed % 3 == 0:
            time.sleep(0.02)  # some replies are here, some are not
        del handles
        check(dispatcher, experts, "random", 70, seed=seed)
    assert len(dispatcher._outbox.calls) <= 2
    assert len(dispatcher._outbox._by_message) <= 60


def shard_of(experts, row_tile):
    """All experts in this process."""
    shard = ExpertShard(
        LAYERS * experts.num_experts, experts.gate_up.shape[-1], experts.down.shape[-1],
        row_tile=row_tile,
    )  # fmt: skip
    slots = {}
    for slot, expert in enumerate(all_experts(experts.num_experts)):
        at = (expert.layer, expert.expert)
        shard.write(slot, ExpertParameters(gate_up=experts.gate_up[at], down=experts.down[at]))
        slots[expert] = slot
    return shard, slots


def test_bit_stable_results_are_those_of_the_local_dispatcher_wherever_experts_are(
    cluster, experts
):
    local = LocalDispatcher(*shard_of(experts, ROW_TILE))
    options = DispatchOptions(bit_stable=True, capacity_rows=64)
    dispatcher = start(cluster, 3, 2, options, bit_stable=True)
    alone = cluster.add_dispatcher(options)
    cluster.add_worker("alone", all_experts(experts.num_experts), bit_stable=True)
    for name in ("worker-0", "worker-1", "worker-2"):
        cluster.states[name] = MemberState.GONE
    view = cluster.view()
    cluster.workers["alone"].call("adopt", view)
    alone.adopt(view)
    alone.wait_ready(DEADLINE_S)
    for kind in KINDS:
        for num_rows in (1, 5, 40, 150):
            x, ids, weights = gating(kind, num_rows, experts)
            wanted = local.combine(local.dispatch(1, x, ids, weights))
            for other in (dispatcher, alone):
                got = other.combine(other.dispatch(1, x, ids, weights))
                assert torch.equal(got, wanted), (kind, num_rows)
            one = [
                dispatcher.combine(
                    dispatcher.dispatch(1, x[i : i + 1], ids[i : i + 1], weights[i : i + 1])
                )
                for i in range(min(num_rows, 5))
            ]
            assert torch.equal(torch.cat(one), wanted[: len(one)]), "whatever the company"


@pytest.mark.parametrize("bit_stable", [False, True])
def test_a_worker_killed_in_mid_run_costs_no_row_where_a_replica_is(cluster, experts, bit_stable):
    options = DispatchOptions(bit_stable=bit_stable)
    dispatcher = start(cluster, 3, 2, options, bit_stable=bit_stable)
    for step in range(150):
        if step == 50:
            cluster.workers["worker-1"].signal(signal.SIGKILL)
        check(dispatcher, experts, KINDS[step % 3], 1 + step % 40, step % LAYERS, step)
    assert dispatcher.stats()["links"] == 2
    assert dispatcher.stats()["parked_s"] < 1.0


@pytest.mark.parametrize("bit_stable", [False, True])
def test_a_row_that_workers_end_by_is_given_up_and_no_other_whoever_sent_it(
    cluster, experts, bit_stable
):
    """Two workers serve, and the next one takes the place of each that ends."""
    names = [f"worker-{i}" for i in range(12)]
    for name in names:
        cluster.add_worker(name, all_experts(7), bit_stable=bit_stable)
        cluster.states[name] = MemberState.WARM
    for name in names[:2]:
        cluster.states[name] = MemberState.ACTIVE
    options = DispatchOptions(bit_stable=bit_stable)
    guilty, innocent = cluster.add_dispatcher(options), cluster.add_dispatcher(options)
    cluster.ready()
    over, all_over = threading.Event(), threading.Event()

    def replace_who_ends():
        while not all_over.wait(0.05):
            serving = [n for n in names if cluster.states[n] is MemberState.ACTIVE]
            for name in serving:
                if not cluster.workers[name].process.is_alive():
                    successor = next(n for n in names if cluster.states[n] is MemberState.WARM)
                    cluster.states |= {name: MemberState.GONE, successor: MemberState.ACTIVE}
                    del cluster.holdings[name]
                    view = cluster.view()
                    for dispatcher in (guilty, innocent):  # workers have their links already
                        dispatcher.adopt(view)
        return [n for n in names if cluster.states[n] is MemberState.GONE]

    def run_innocent():
        num_steps = 0
        while not over.is_set():
            check(innocent, experts, "random", 9, seed=num_steps)
            num_steps += 1
        return num_steps

    replacing, running = in_thread(replace_who_ends), in_thread(run_innocent)
    x, ids, weights = gating("random", 9, experts)
    x[4, 0] = POISON
    handle = guilty.dispatch(0, x, ids, weights)
    guilty.combine(handle)
    over.set()

    assert list(handle.given_up) == [4]
    assert running() > 0, "it goes on, with whoever takes the place of those that ended"
    for seed in range(5):
        check(guilty, experts, "random", 9, seed=seed)
    all_over.set()
    ended = replacing()
    print(f"{len(ended)} workers ended")
    assert 2 <= len(ended) <= 9, (
        "its last word may be lost with a worker, which then proves nothing"
    )


def test_rows_of_a_lost_last_copy_are_parked_until_a_view_covers_them(cluster, experts):
    dispatcher = start(cluster, 2, 1)
    spare = cluster.add_worker("spare", [])
    cluster.states["spare"] = MemberState.WARM
    cluster.ready()
    check(dispatcher, experts, "random", 8)
    lost = [expert for expert in all_experts(7) if expert in cluster.holdings["worker-1"]]
    cluster.workers["worker-1"].signal(signal.SIGKILL)

    result = in_thread(
        lambda: [check(dispatcher, experts, kind, 9, seed=s) for kind in KINDS for s in range(3)]
    )
    wait_until(lambda: dispatcher.stats()["parked_s"] > 0)
    cluster.publish()  # a newer View without help changes nothing
    time.sleep(0.2)
    assert result.running()
    assert spare.process.is_alive()
    cluster.load("spare", lost)
    cluster.states |= {"spare": MemberState.ACTIVE, "worker-1": MemberState.GONE}
    del cluster.holdings["worker-1"]
    cluster.publish()
    result()
    stats = dispatcher.stats()
    assert sum(stats["recoveries"]) == 1, "one layer lost rows; those after it never sent them"
    assert stats["recovery_s"] > 0.2


def test_a_worker_that_lacks_an_expert_says_so_and_its_replica_answers(cluster, experts):
    dispatcher = start(cluster, 2, 2)
    worker = cluster.workers["worker-0"]
    worker.call("unload", {e: s for e, s in cluster.holdings["worker-0"].items() if e.expert < 4})
    for seed in range(20):
        check(dispatcher, experts, KINDS[seed % 3], 6, seed % LAYERS, seed)
    assert dispatcher.stats()["stale_answers"] > 0
    assert worker.call("stats").stale_answers == dispatcher.stats()["stale_answers"]
    assert dispatcher.stats()["parked_s"] == 0


def test_a_stale_last_copy_is_asked_again_until_it_holds_the_expert(cluster, experts):
    dispatcher = start(cluster, 1)
    slots = {ExpertId(0, 2): cluster.holdings["worker-0"][ExpertId(0, 2)]}
    cluster.workers["worker-0"].call("unload", slots)
    result = in_thread(lambda: check(dispatcher, experts, "random", 30))
    wait_until(lambda: dispatcher.stats()["stale_answers"] >= 2)
    cluster.workers["worker-0"].call("load", slots)
    result()


def test_a_frozen_worker_is_suspected_and_hedged_but_not_dropped(cluster, experts):
    options = DispatchOptions(first_deadline_s=0.3, min_deadline_s=0.3)
    dispatcher = start(cluster, 2, 2, options)
    for seed in range(20):
        check(dispatcher, experts, "random", 8, seed=seed)
    frozen = cluster.workers["worker-0"]
    frozen.signal(signal.SIGSTOP)
    try:
        for seed in range(20):
            check(dispatcher, experts, "random", 8, seed=seed)
        stats = dispatcher.stats()
        assert stats["hedges"] >= 1
        assert stats["suspicions"] >= 1
        assert stats["links"] == 2, "suspicion is not eviction"
    finally:
        frozen.signal(signal.SIGCONT)

    def late_reply():
        check(dispatcher, experts, "random", 8)
        return dispatcher.stats()["late_replies"]

    wait_until(late_reply)
    before = dispatcher.stats()["rows_by_worker"]["worker-0.1"]
    for seed in range(20):
        check(dispatcher, experts, "random", 8, seed=seed)
    assert dispatcher.stats()["rows_by_worker"]["worker-0.1"] > before, "it serves again"
    assert dispatcher.stats()["links_opened"] == 2


def test_a_frozen_last_copy_is_waited_for(cluster, experts):
    dispatcher = start(cluster, 2, 1, DispatchOptions(first_deadline_s=0.1, min_deadline_s=0.1))
    frozen = cluster.workers["worker-0"]
    frozen.signal(signal.SIGSTOP)
    result = in_thread(lambda: check(dispatcher, experts, "random", 8))
    wait_until(lambda: dispatcher.stats()["suspicions"] >= 1)
    assert result.running()
    frozen.signal(signal.SIGCONT)
    result()
    assert dispatcher.stats()["hedges"] == 0


def test_a_silent_link_is_broken_by_its_time_out_and_opened_again(cluster, experts):
    options = DispatchOptions(first_deadline_s=0.2, link_timeout_s=1.0)
    dispatcher = start(cluster, 1, 1, options)
    check(dispatcher, experts, "random", 8)
    frozen = cluster.workers["worker-0"]
    frozen.signal(signal.SIGSTOP)
    result = in_thread(lambda: check(dispatcher, experts, "random", 8))
    wait_until(lambda: dispatcher.stats()["links"] == 0)
    frozen.signal(signal.SIGCONT)
    result()
    assert dispatcher.stats()["links_opened"] == 2


def test_idle_links_are_kept_by_pings(cluster, experts):
    dispatcher = start(cluster, 2, 1, DispatchOptions(link_timeout_s=1.0))
    time.sleep(2.5)
    check(dispatcher, experts, "random", 8)
    assert dispatcher.stats()["links_opened"] == 2


def test_two_gateways_at_different_paces_do_not_wait_for_each_other(cluster, experts):
    quick = start(cluster, 2, 1)
    slow = cluster.add_dispatcher()
    cluster.ready()
    x, ids, weights = gating("random", 9, experts)
    waiting = slow.dispatch(0, x, ids, weights)  # and does not combine for a long while
    for seed in range(10):
        check(quick, experts, "hot", 50, seed=seed)
    assert close_to(slow.combine(waiting), experts.dense(0, x, ids, weights))
    others = [
        in_thread(lambda d=d, n=n: [check(d, experts, "random", n, seed=s) for s in range(40)])
        for d, n in ((quick, 3), (slow, 30))
    ]
    for other in others:
        other()
    stats = [worker.call("stats") for worker in cluster.workers.values()]
    assert all(s.links == 2 for s in stats)
    assert all(s.calls >= s.batches > 0 for s in stats)


def test_a_gateway_that_ends_leaves_the_others_alone(cluster, experts):
    first, second = start(cluster, 2, 1), cluster.add_dispatcher()
    cluster.ready()
    first.close()
    check(second, experts, "random", 20)
    wait_until(lambda: all(w.call("stats").links == 1 for w in cluster.workers.values()))
    assert second.stats()["links_opened"] == 2


def test_workers_join_and_leave_by_view_alone(cluster, experts):
    dispatcher = start(cluster, 1)
    result = in_thread(
        lambda: [check(dispatcher, experts, "random", 12, seed=s) for s in range(150)]
    )
    cluster.add_worker("late", all_experts(7))
    cluster.publish()
    wait_until(lambda: dispatcher.stats()["rows_by_worker"].get("late.1", 0) > 0)
    cluster.states["worker-0"] = MemberState.GONE
    cluster.publish()
    result()
    wait_until(lambda: dispatcher.stats()["links"] == 1)
    assert dispatcher.stats()["parked_s"] == 0


def test_a_draining_worker_gets_only_what_nobody_else_holds(cluster, experts):
    held = spread(7, 2, 1)
    cluster.add_worker("leaving", all_experts(7))
    cluster.add_worker("staying", held[0])
    dispatcher = cluster.add_dispatcher()
    cluster.ready()
    cluster.states["leaving"] = MemberState.DRAINING
    cluster.ready()
    before = dispatcher.stats()["rows_by_worker"]
    x, ids, weights = gating("random", 40, experts)
    y = dispatcher.combine(dispatcher.dispatch(0, x, ids, weights))
    assert close_to(y, experts.dense(0, x, ids, weights))
    left = torch.tensor([ExpertId(0, e) in held[0] for e in range(7)])[ids]
    after = dispatcher.stats()["rows_by_worker"]
    assert after["staying.1"] - before["staying.1"] == int(left.any(1).sum())
    assert after["leaving.1"] - before["leaving.1"] == int((~left).any(1).sum())


def test_closing_ends_a_wait_for_parked_rows(cluster, experts):
    dispatcher = cluster.add_dispatcher()
    x, ids, weights = gating("random", 4, experts)
    handle = dispatcher.dispatch(0, x, ids, weights)
    result = in_thread(lambda: dispatcher.combine(handle))
    time.sleep(0.1)
    dispatcher.close()
    with pytest.raises(LinkClosedError):
        result(5.0)


def test_readiness_is_refused_in_time_and_says_what_is_missing(cluster):
    dispatcher = cluster.add_dispatcher()
    dispatcher.adopt(cluster.view())
    with pytest.raises(DeadlineError, match="not all experts"):
        dispatcher.wait_ready(0.05)


def test_there_are_never_more_links_than_a_process_may_have(cluster, experts):
    dispatcher = start(cluster, 2, 1, DispatchOptions(max_links=2))
    cluster.add_worker("third", [])
    dispatcher.adopt(cluster.view())
    check(dispatcher, experts, "random", 5)
    assert len(dispatcher.stats()["rows_by_worker"]) == 2


def test_an_older_view_changes_nothing(cluster, experts):
    dispatcher = cluster.add_dispatcher()
    old = cluster.view()
    for i, held in enumerate(spread(7, 2)):
        cluster.add_worker(f"worker-{i}", held)
    cluster.ready()
    dispatcher.adopt(old)
    check(dispatcher, experts, "random", 5)
