"""Numbers of members that follow load, on nodes that Ray's own autoscaler brings and takes."""

import argparse
import subprocess
import sys
from collections import Counter

import pytest

from cluster.chaos.run import ChaosOptions, Run, report_of
from cluster.demo.path import demo_model_path
from tests.accept.autoscale import Plan, run
from tests.cluster.harness_head import IDLE_S, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TYPES = {
    "expert": {
        "resources": {"CPU": 0, "expert_slot": 1},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 4,
    }
}
# Ray belongs to a process, so the contract is checked in one of its own.
CONTRACT = """
import sys, time
import ray
from cluster.control.node_demand import NodeDemand
from cluster.runtime.nodes import node_addresses
from tests.actuator_contract import check_nodes_follow_members
from workers.placement import Role

ray.init(address=sys.argv[1], namespace="contract", logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=0, resources={"expert_slot": 1})
class Tenant:
    def node(self):
        return ray.get_runtime_context().get_node_id()

class Nodes:
    def __init__(self):
        self.head = set(node_addresses())
        self.tenants = {}

    def nodes(self):
        return frozenset(set(node_addresses()) - self.head)

    def want(self, member):
        self.tenants[member] = Tenant.remote()

    def live(self, member):
        return ray.get(self.tenants[member].node.remote(), timeout=60)

    def leave(self, member):
        ray.kill(self.tenants.pop(member))

    def advance(self):
        time.sleep(0.5)

world = Nodes()
check_nodes_follow_members(
    NodeDemand(), world, Role.EXPERT_WORKER, count=2, most_moments=120,
    quiet_moments=int(sys.argv[2]),
)
world.tenants.clear()
deadline = time.perf_counter() + 60
while world.nodes():
    assert time.perf_counter() < deadline, world.nodes()
    time.sleep(0.5)
print("held")
"""


def test_nodes_follow_members_as_ray_autoscaler_brings_and_takes_them() -> None:
    with ray_head("memory", node_types=TYPES) as head:
        moments = int(2 * IDLE_S) // 2  # half of what Ray waits before it takes an idle node
        ended = subprocess.run(
            [sys.executable, "-c", CONTRACT, head.address, str(moments)],
            env=dict(head.environment),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.strip().endswith("held")


def test_load_that_triples_brings_workers_and_nodes_and_no_client_can_tell() -> None:
    options = argparse.Namespace(
        fewest=2, most=4, target=0.05, queue_s=0.5, down_s=1e6, expert_ms=0.0
    )
    plan = Plan(rate=0.4, calm_s=2, peak_s=32, after_s=0, seed=0)
    seen = run(options, plan, workers=2, follows_load=True)
    report = report_of(Run(seen.answers, [], Counter()), ChaosOptions(counts={}), demo_model_path())
    last = seen.samples[-1]
    print(seen.changes, last)
    assert report["passed"], report["problems"]
    assert last["serving"] == last["nodes"] >= 3
    assert len(seen.first_row_s) >= 3  # the newcomers compute, too
    assert all("busy" in change["why"] for change in seen.changes)
    assert len(seen.gateways) == 1
