"""Chaos in the short form: a real cluster is harmed under load, and no client can tell.

`make accept-chaos` and its sisters are the long form.
"""

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cluster.chaos.faults import Fault
from cluster.chaos.run import ChaosOptions, report_of, run_chaos
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from cluster.pb.expertmesh.v1.cluster_pb2_grpc import ClusterServiceStub
from tests.cluster.harness_serve import Served, served
from workers.clock import SystemClock

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SEED = 3


def expertmesh(
    cluster: Served, *arguments: str, timeout: float = 60
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "expertmesh", *arguments, "--server", cluster.endpoint]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_kills_freezes_joins_drains_and_a_dead_controller_change_nothing_for_clients() -> None:
    counts = {
        Fault.KILL: 3, Fault.KILL_TWO: 1, Fault.FREEZE: 1, Fault.JOIN: 1, Fault.DRAIN: 1,
        Fault.KILL_CONTROLLER: 1,
    }  # fmt: skip
    options = ChaosOptions(counts=counts, concurrency=8, seed=SEED)
    print(f"seed {SEED}")
    with served(
        "--allow-chaos", "--gateways", "2", "--expert-workers", "3",
        "--set", "experts.standby=1", "--set", "experts.min=1",
    ) as cluster:  # fmt: skip
        run = asyncio.run(run_chaos(cluster.endpoint, options, clock=SystemClock(), progress=print))
        operators_have_their_say(cluster)

    report = report_of(run, options, demo_model_path())
    print(report)
    assert report["problems"] == {"lost": [], "refused": [], "out_of_order": [], "short": []}
    assert report["replay"]["wrong"] == 0
    assert report["replay"]["sequences"] >= 16
    assert sum(report["faults"].values()) == sum(counts.values())


def test_dead_gateways_and_front_doors_and_cut_connections_change_nothing_for_clients() -> None:
    counts = {
        Fault.KILL_GATEWAY: 2, Fault.FREEZE_GATEWAY: 1, Fault.KILL_FRONT_DOOR: 1,
        Fault.KILL_BOTH: 1, Fault.CUT: 2,
    }  # fmt: skip
    options = ChaosOptions(counts=counts, concurrency=4, seed=SEED)
    print(f"seed {SEED}")
    with served(
        "--allow-chaos", "--gateways", "2", "--tensor-parallel", "2", "--expert-workers", "0",
        "--set", "front_doors.count=2",
    ) as cluster:  # fmt: skip
        run = asyncio.run(run_chaos(cluster.endpoint, options, clock=SystemClock(), progress=print))

    report = report_of(run, options, demo_model_path())
    print(report)
    assert report["problems"] == {"lost": [], "refused": [], "out_of_order": [], "short": []}
    assert report["replay"]["wrong"] == 0
    assert report["resumed_calls"] > 0
    assert sum(report["faults"].values()) == sum(counts.values())


def test_a_cell_that_loses_its_experts_borrows_them_and_no_client_can_tell() -> None:
    options = ChaosOptions(counts={Fault.KILL: 2}, concurrency=4, seed=SEED)
    arguments = (
        "--allow-chaos", "--gateways", "2", "--expert-workers", "4",
        "--set", "control.cells=2", "--set", "experts.floor=1",
    )  # fmt: skip
    with served(*arguments) as cluster, callers(cluster) as calls:
        run = asyncio.run(run_chaos(cluster.endpoint, options, clock=SystemClock(), progress=print))

    report = report_of(run, options, demo_model_path())
    print(report, calls)
    assert report["problems"] == {"lost": [], "refused": [], "out_of_order": [], "short": []}
    assert report["replay"]["wrong"] == 0
    # A floor of one copy: each kill loses a cell some experts, and the other cell lends them.
    assert {(0, 0), (1, 1)} <= calls
    assert calls & {(0, 1), (1, 0)}


@contextlib.contextmanager
def callers(cluster: Served) -> Iterator[set[tuple[int, int]]]:
    """Collect, as long as the context lasts, gateways of which cell call workers of which."""
    calls: set[tuple[int, int]] = set()
    ended = threading.Event()
    stub = ClusterServiceStub(cluster.channel)

    def look() -> None:
        while not ended.wait(0.1):
            view = stub.GetView(pb.GetViewRequest(), timeout=30).view
            cells = {f"{m.name}.{m.incarnation}": m.cell for m in view.members}
            for member in view.members:
                for worker, rows in member.gateway_stats.rows_by_worker.items():
                    if rows and worker in cells:
                        calls.add((member.cell, cells[worker]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield calls
    finally:
        ended.set()
        thread.join()


def operators_have_their_say(cluster: Served) -> None:
    """The command line of operators, on the same cluster."""
    assert "experts: 3 -> 4 wanted" in expertmesh(cluster, "scale", "experts", "4").stdout
    stub = ClusterServiceStub(cluster.channel)
    status = stub.GetStatus(pb.GetStatusRequest(), timeout=10).status
    (pool,) = [p for p in status.pools if p.role == pb.ROLE_EXPERT_WORKER]
    assert (pool.wanted, status.allows_chaos) == (4, True)
    assert any(m.role == pb.ROLE_CONTROLLER and m.pid for m in status.view.members)
    assert any(health.HasField("worker_stats") for health in status.members)

    refused = expertmesh(cluster, "drain", "nobody-1")
    assert refused.returncode == 1
    assert "NOT_FOUND: no member nobody-1" in refused.stderr
    refused = expertmesh(cluster, "scale", "experts", "200")
    assert "FAILED_PRECONDITION" in refused.stderr
    drained = expertmesh(cluster, "drain", "gateway-1")
    assert "gateway-1" in drained.stdout


def test_chaos_is_refused_where_it_was_not_allowed() -> None:
    with served("--expert-workers", "1") as cluster:
        refused = expertmesh(cluster, "chaos", "--kills", "1")

        assert refused.returncode == 1
        assert "--allow-chaos" in refused.stderr
        assert len(cluster.members("EXPERT_WORKER")) == 1
