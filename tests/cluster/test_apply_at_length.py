"""What befalls an applied cluster from outside: its file, its head, its nodes."""

import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from cluster.chaos.faults import Saboteur
from cluster.chaos.run import ChaosOptions, report_of, run_script
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2
from tests.cluster.harness_apply import RESOURCES, Site, command, site
from tests.cluster.harness_head import ray_head
from workers.clock import SystemClock

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.timeout(900)]
READY_S = 300.0
DRAIN_S = 60


class Watcher:
    """`expertmesh apply --watch`, and the lines that it prints."""

    def __init__(self, cluster: Site) -> None:
        self.process = subprocess.Popen(
            command("apply", "-f", str(cluster.config), "--watch", *cluster.address),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def ready(self) -> str:
        """Wait for the next line that says where it serves."""
        return self._lines.get(timeout=READY_S)

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)


@contextlib.contextmanager
def watching(cluster: Site) -> Iterator[Watcher]:
    watcher = Watcher(cluster)
    try:
        yield watcher
    finally:
        watcher.process.terminate()
        assert watcher.process.wait(60) == 0


def members(cluster: Site) -> dict[str, int]:
    status = cluster.run("status", "--json", "--server", cluster.endpoint)
    assert status.returncode == 0, status.stderr
    return {
        f"{m['name']}.{m['incarnation']}": m["pid"] for m in json.loads(status.stdout)["members"]
    }


def test_a_changed_file_and_a_lost_head_are_answered_by_applying_again() -> None:
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(site(**{"experts.workers": 1}))
        stack.callback(cluster.down)
        watcher = stack.enter_context(watching(cluster))
        assert watcher.ready() == f"ready {cluster.endpoint}\n"
        first = members(cluster)

        cluster.configure({"experts.workers": 2})
        watcher.ready()
        second = members(cluster)
        assert first.items() < second.items()

        for process in cluster.head.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        ports = tuple(
            int(address.rpartition(":")[2])
            for address in (cluster.head.address, cluster.head.client_address)
        )
        stack.enter_context(ray_head("memory", resources=RESOURCES, ports=ports))
        watcher.ready()
        third = members(cluster)
        assert third.keys().isdisjoint(second)
        assert len(third) == len(second)


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_node_that_is_told_to_end_is_left_in_time_and_nothing_is_lost(taken_over: bool) -> None:
    changes = {
        "experts.workers": 4, "experts.floor": 1, "control.allow_chaos": True,
        "experts.resources": {"expert_slot": 4},  # two find room on each node
        "gateways.resources": {"gateway": 1}, "front_doors.resources": {"frontdoor": 1},
    }  # fmt: skip
    options = ChaosOptions(counts={}, concurrency=4, seed=7)
    with site(resources={**RESOURCES, "expert_slot": 8}, **changes) as cluster:
        nodes = []

        def join(host: str) -> subprocess.Popen:
            environment = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}
            nodes.append(cluster.head.join_in_foreground(host, {"expert_slot": 8}, **environment))
            return nodes[-1]

        try:
            report = leave_under_load(cluster, join, options, taken_over=taken_over)
        finally:
            for node in nodes:
                node.kill()
                node.wait(30)
            cluster.down()
    assert report["passed"], report


def leave_under_load(
    cluster: Site,
    join: Callable[[str], subprocess.Popen],
    options: ChaosOptions,
    *,
    taken_over: bool,
) -> dict:
    """Have the node end on which half of the workers run, with room on another one."""
    node = join("127.0.0.2")
    started = cluster.apply()
    assert started.returncode == 0, started.stderr
    join("127.0.0.3")

    async def script(saboteur: Saboteur) -> None:
        whole = await saboteur.whole()
        before = {m.name: m.node for m in whole.view.members if m.pid}
        at_head = {n for name, n in before.items() if name.startswith("gateway")}
        away = {name for name, n in before.items() if n not in at_head}
        (ending,) = {before[name] for name in away}
        assert len(away) == 2
        if taken_over:
            (controller,) = [m for m in whole.view.members if m.role == cluster_pb2.ROLE_CONTROLLER]
            os.kill(controller.pid, signal.SIGKILL)
            await saboteur.whole(without=(f"{controller.name}.{controller.incarnation}",))
        async with saboteur.fault("node ends", tuple(sorted(away))):
            node.terminate()
            await asyncio.to_thread(node.wait, DRAIN_S)
        after = (await saboteur.whole()).view.members
        workers = [m for m in after if m.role == cluster_pb2.ROLE_EXPERT_WORKER]
        assert ending not in {m.node for m in after}
        assert len(workers) == 4

    run = asyncio.run(run_script(cluster.endpoint, options, script, clock=SystemClock()))
    return report_of(run, options, demo_model_path())
