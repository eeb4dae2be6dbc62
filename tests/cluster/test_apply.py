"""A cluster on a Ray head: applied, applied again, changed, rolled out under load, taken down.

`make accept-rollout` is the long form.
"""

import json

import grpc
import psutil
import pytest

from cluster.chaos.run import ChaosOptions
from cluster.pb.expertmesh.v1 import cluster_pb2
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from cluster.pb.expertmesh.v1.cluster_pb2_grpc import ClusterServiceStub
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from tests.accept.rollout import run_rollouts
from tests.cluster.harness_apply import Site, site

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SEED = 5
NUM_EXPERTS = 256  # of all layers of the demo model
SLOTS, LARGE_SLOTS = 80, 200


def pids(cluster: Site) -> dict[str, int]:
    status = cluster.run("status", "--json", "--server", cluster.endpoint)
    assert status.returncode == 0, status.stderr
    return {
        f"{m['name']}.{m['incarnation']}": m["pid"] for m in json.loads(status.stdout)["members"]
    }


def answer(cluster: Site) -> list[int]:
    request = pb.GenerateRequest(
        text="In the beginning",
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(max_tokens=12, ignore_eos=True),
    )
    with grpc.insecure_channel(cluster.endpoint) as channel:
        responses = InferenceServiceStub(channel).Generate(request, timeout=60)
        return [token for response in responses for token in response.token_ids]


def controller_pid(cluster: Site) -> int:
    with grpc.insecure_channel(cluster.endpoint) as channel:
        request = cluster_pb2.GetStatusRequest()
        status = ClusterServiceStub(channel).GetStatus(request, timeout=30).status
    (member,) = (m for m in status.view.members if m.role == cluster_pb2.ROLE_CONTROLLER)
    return member.pid


def test_a_cluster_is_applied_changed_and_replaced_under_load_and_taken_down() -> None:
    print(f"seed {SEED}")
    with site(**{"experts.workers": 1, "control.allow_chaos": True}) as cluster:
        started = cluster.apply()
        assert started.stdout == f"ready {cluster.endpoint}\n", started.stderr
        first, tokens = pids(cluster), answer(cluster)

        again = cluster.apply()
        assert (again.stdout, pids(cluster)) == (started.stdout, first)

        cluster.configure({"experts.workers": 2, "gateways.max_waiting": 64})
        changed = cluster.apply().stderr
        assert "scaled: experts.workers: 1 -> 2" in changed
        assert "at the next rollout: gateways.max_waiting: 1024 -> 64" in changed
        assert "1 members run with older settings" in changed
        second = pids(cluster)
        assert first.items() < second.items()
        assert len(second) == len(first) + 1

        cluster.configure({"model.dtype": "bfloat16"})
        refused = cluster.apply()
        assert refused.returncode == 1
        assert "model.dtype: auto -> bfloat16" in refused.stderr
        cluster.configure({"model.dtype": "auto", "experts.slots": 1})
        unfit = cluster.apply()
        assert unfit.returncode == 1
        assert "experts.slots: 1 slots on 2 workers cannot hold" in unfit.stderr
        assert "Traceback" not in unfit.stderr
        cluster.configure({"experts.slots": 0})

        chaos = ChaosOptions(counts={}, concurrency=4, seed=SEED, breaks_streams=True)
        report = run_rollouts(cluster, chaos, rounds=1)
        assert report["passed"], report
        assert report["replay"]["sequences"] >= 4
        third = pids(cluster)
        assert second.keys().isdisjoint(third)
        assert answer(cluster) == tokens

        processes = [psutil.Process(pid) for pid in third.values()]
        assert cluster.down().stdout == "ended\n"
        assert not psutil.wait_procs(processes, timeout=30)[1]
        assert cluster.down().stdout == "nothing ran\n"


def test_a_cluster_whose_journal_is_lost_serves_on_and_is_not_started_twice() -> None:
    with site(**{"experts.workers": 1}) as cluster:
        assert cluster.apply().returncode == 0
        before, tokens = pids(cluster), answer(cluster)
        aside = cluster.journal.with_name("aside")
        cluster.journal.rename(aside)
        psutil.Process(controller_pid(cluster)).kill()

        refused = cluster.apply()
        assert refused.returncode == 1
        assert "yet 3 processes of a cluster run here" in refused.stderr
        assert answer(cluster) == tokens

        for path in aside.iterdir():
            path.rename(cluster.journal / path.name)
        assert cluster.apply().stdout == f"ready {cluster.endpoint}\n"
        assert pids(cluster) == before
        assert answer(cluster) == tokens
        assert cluster.down().stdout == "ended\n"


def test_workers_have_the_slots_of_their_nodes_pools() -> None:
    """Two nodes, one of a pool with larger GPUs; a worker fits on each."""
    settings = {
        "experts.workers": 2,
        "experts.floor": 1,
        "experts.resources": {"expert_slot": 1},
        "experts.slots": SLOTS,
        "experts.pool_slots": {"expert-large": LARGE_SLOTS},
    }
    with site(resources={"gateway": 1, "frontdoor": 1}, **settings) as cluster:
        for host, pool in (("127.0.0.2", "expert-small"), ("127.0.0.3", "expert-large")):
            cluster.head.join(host, {"expert_slot": 1}, (), {"expertmesh/pool": pool})
        applied = cluster.apply()
        assert applied.stdout == f"ready {cluster.endpoint}\n", applied.stderr
        status = cluster.run("status", "--json", "--server", cluster.endpoint)
        members = json.loads(status.stdout)["members"]
        workers = [m for m in members if m["role"] == "ROLE_EXPERT_WORKER"]
        assert sorted(w["num_slots"] for w in workers) == [SLOTS, LARGE_SLOTS]
        assert all(w["slots_used"] <= w["num_slots"] for w in workers)
        assert sum(w["slots_used"] for w in workers) >= NUM_EXPERTS
        assert max(w["slots_used"] for w in workers) > SLOTS
        assert len(answer(cluster)) == 12
        cluster.down()
