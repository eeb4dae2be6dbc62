"""Numbers of members that follow load, on nodes that Ray's own autoscaler brings and takes."""

import subprocess
import sys

import pytest

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
