"""A real cluster on this machine: Ray actors, Gloo links, gRPC, the shipped model."""

import os
import random
import signal
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from tests.cluster.harness_serve import Served, descendants, served, token_ids

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


NUM_EXPERTS = 8 * 32  # of the demo model


@pytest.fixture(scope="module")
def cluster():
    with served("--tensor-parallel", "2", "--expert-workers", "3") as running:
        # Two where this machine's memory allows: so it is until a worker is replaced.
        eventually(lambda: copies_of(running) in {1, 2})
        yield running


def eventually(condition, deadline_s: float = 15.0) -> None:
    end = time.perf_counter() + deadline_s
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.05)


def copies_of(cluster: Served) -> float:
    """Return how many copies an expert has, on average."""
    return sum(m["slots_used"] for m in cluster.members("EXPERT_WORKER")) / NUM_EXPERTS


def num_slots(cluster: Served) -> int:
    return sum(m["num_slots"] for m in cluster.members("EXPERT_WORKER"))


def test_an_answer_streams_token_by_token_and_crosses_every_role(cluster: Served) -> None:
    before = {m["name"]: rows_received(cluster, m) for m in cluster.members("EXPERT_WORKER")}

    responses = cluster.generate(max_tokens=20)

    assert len(token_ids(responses)) == 20
    assert sum(bool(r.token_ids) for r in responses) > 10
    assert "".join(r.text for r in responses).strip()
    for member in cluster.members("EXPERT_WORKER"):
        assert rows_received(cluster, member) > before[member["name"]]


def rows_received(cluster: Served, member: dict) -> float:
    series = cluster.metrics(member)
    return next(v for k, v in series.items() if k.startswith("expertmesh_worker_rows_total"))


def test_status_names_every_member_with_pid_state_and_slots(cluster: Served) -> None:
    status = cluster.status()

    roles = sorted(m["role"] for m in status["members"])
    assert roles == ["ROLE_EXPERT_WORKER"] * 3 + ["ROLE_FRONT_DOOR", "ROLE_GATEWAY"]
    assert {m["state"] for m in status["members"]} == {"MEMBER_STATE_ACTIVE"}
    assert status["coverage"]["complete"] is True
    pids = {p.pid for p in descendants(cluster.process.pid)}
    assert {m["pid"] for m in status["members"]} <= pids
    assert 1 <= copies_of(cluster) <= num_slots(cluster) / NUM_EXPERTS  # repairs may leave more


def test_health_is_serving(cluster: Served) -> None:
    answer = HealthStub(cluster.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_same_seed_gives_the_same_tokens_alone_and_in_company(cluster: Served) -> None:
    alone = token_ids(cluster.generate(temperature=1.0, seed=5, max_tokens=16))
    calls = [
        cluster.inference.Generate(
            pb.GenerateRequest(
                text="In the beginning" if i == 3 else "And " * (i + 1),
                sampling=pb.Sampling(temperature=1.0, seed=5 if i == 3 else i),
                stopping=pb.Stopping(max_tokens=16, ignore_eos=True),
            ),
            timeout=60,
        )
        for i in range(8)
    ]
    answers = [token_ids(list(call)) for call in calls]

    assert answers[3] == alone
    assert all(len(a) == 16 for a in answers)


def test_clients_that_vanish_leave_no_block_behind(cluster: Served) -> None:
    draw = random.Random(7)
    for _ in range(25):
        call = cluster.inference.Generate(
            pb.GenerateRequest(
                text="Now it came to pass " * draw.randrange(1, 20),
                stopping=pb.Stopping(max_tokens=400, ignore_eos=True),
            ),
            timeout=draw.choice([0.05, 0.3, 30]),
        )
        try:
            for _ in range(draw.randrange(5)):
                next(call)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        call.cancel()

    (gateway,) = cluster.members("GATEWAY")

    def all_free() -> bool:
        series = cluster.metrics(gateway)
        used = [v for k, v in series.items() if "blocks_used" in k]
        assert len(used) == 2
        return sum(used) == 0

    eventually(all_free)


def test_a_killed_expert_worker_is_replaced_and_the_running_answer_is_unchanged(
    cluster: Served,
) -> None:
    expected = token_ids(cluster.generate(max_tokens=120))
    victim = cluster.members("EXPERT_WORKER")[1]
    call = cluster.inference.Generate(
        pb.GenerateRequest(
            text="In the beginning",
            sampling=pb.Sampling(temperature=0),
            stopping=pb.Stopping(max_tokens=120, ignore_eos=True),
        ),
        timeout=90,
    )
    received = []
    for response in call:
        received += response.token_ids
        if victim and len(received) >= 10:
            os.kill(victim["pid"], signal.SIGKILL)
            victim = None

    assert received == expected


def test_sigterm_drains_and_leaves_no_process_behind() -> None:
    with served("--expert-workers", "0") as running:
        assert len(token_ids(running.generate())) == 12
        everybody = descendants(running.process.pid)
        assert len(everybody) > 3

        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0

        eventually(lambda: not any(p.is_running() and p.status() != "zombie" for p in everybody))
