"""A real cluster of two gateways, one of which dies or leaves while answers stream."""

import os
import signal
import time

import grpc
import pytest

from cluster.frontdoor.flight import ROUTE_KEY
from cluster.pb.expertmesh.v1 import cluster_pb2
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from cluster.pb.expertmesh.v1.cluster_pb2_grpc import ClusterServiceStub
from tests.cluster.harness_serve import Served, served

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

INTERVAL = 16
TOKENS = 500


@pytest.fixture(scope="module")
def cluster():
    with served(
        "--gateways", "2", "--expert-workers", "0",
        "--set", f"gateways.snapshot_tokens={INTERVAL}",
        "--set", "dispatch.bit_stable=true",
    ) as running:  # fmt: skip
        yield running


def stream(cluster: Served, max_tokens: int, **sampling):
    return cluster.inference.Generate(
        pb.GenerateRequest(
            text="In the beginning",
            sampling=pb.Sampling(**sampling),
            stopping=pb.Stopping(max_tokens=max_tokens, ignore_eos=True),
        ),
        timeout=120,
    )


def read(call, received: list[int], until: int) -> None:
    """Read on until so many tokens are there; their indices have neither gap nor repeat."""
    for response in call:
        if response.token_ids:
            assert response.first_token_index == len(received)
            received += response.token_ids
        if len(received) >= until:
            return


def metric(cluster: Served, member: dict, name: str) -> float:
    """Return a metric of a gateway that serves."""
    series = cluster.metrics(member)
    return next(v for k, v in series.items() if k.startswith(f"expertmesh_gateway_{name}{{"))


def gateways(cluster: Served) -> list[dict]:
    """Return both gateways, once both serve; one that was drained is replaced first."""
    stub = ClusterServiceStub(cluster.channel)
    stub.Scale(cluster_pb2.ScaleRequest(role=cluster_pb2.ROLE_GATEWAY, count=2), timeout=30)
    for _ in range(120):
        members = [m for m in cluster.members("GATEWAY") if m["state"] == "MEMBER_STATE_ACTIVE"]
        if len(members) == 2:
            return members
        time.sleep(0.5)
    raise AssertionError(cluster.status())


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}])
def test_a_killed_gateways_stream_goes_on_from_its_snapshot_with_the_same_tokens(
    cluster: Served, sampling
) -> None:
    expected: list[int] = []
    read(stream(cluster, TOKENS, **sampling), expected, TOKENS)
    members = gateways(cluster)
    call, received = stream(cluster, TOKENS, **sampling), []
    read(call, received, 100)
    victim, other = sorted(members, key=lambda m: -metric(cluster, m, "running_sequences"))
    restores = metric(cluster, other, "restores_total")
    replayed = metric(cluster, other, "replayed_tokens_total")
    assert metric(cluster, victim, "running_sequences") == 1
    os.kill(victim["pid"], signal.SIGKILL)
    read(call, received, TOKENS + 1)

    assert received == expected
    legs = dict(leg.split("@") for leg in dict(call.trailing_metadata())[ROUTE_KEY].split())
    assert [leg.split(".")[0] for leg in legs] == [victim["name"], other["name"]]
    assert 100 <= int(list(legs.values())[1]) < TOKENS
    assert metric(cluster, other, "restores_total") - restores == 1
    assert metric(cluster, other, "recomputes_total") == 0
    assert 0 <= metric(cluster, other, "replayed_tokens_total") - replayed < 2 * INTERVAL


def test_a_drained_gateway_hands_its_sequences_over(cluster: Served) -> None:
    expected: list[int] = []
    read(stream(cluster, TOKENS, temperature=0), expected, TOKENS)
    members = gateways(cluster)
    call, received = stream(cluster, TOKENS, temperature=0), []
    read(call, received, 50)
    leaving, other = sorted(members, key=lambda m: -metric(cluster, m, "running_sequences"))
    recomputes = metric(cluster, other, "recomputes_total")
    replayed = metric(cluster, other, "replayed_tokens_total")
    restores = metric(cluster, other, "restores_total")
    stub = ClusterServiceStub(cluster.channel)
    stub.Drain(cluster_pb2.DrainRequest(member=leaving["name"]), timeout=30)
    read(call, received, TOKENS)

    assert received == expected
    assert metric(cluster, other, "restores_total") - restores == 1
    assert metric(cluster, other, "recomputes_total") == recomputes
    assert metric(cluster, other, "replayed_tokens_total") - replayed <= 2 * INTERVAL


def test_a_warm_gateway_goes_on_with_the_stream_of_the_only_one_that_served() -> None:
    """It has its weights; without a second gateway the request starts over from the prompt."""
    with served(
        "--expert-workers", "0", "--set", "gateways.standby=1",
        "--set", "dispatch.bit_stable=true",
    ) as running:  # fmt: skip
        expected: list[int] = []
        read(stream(running, TOKENS, temperature=0), expected, TOKENS)
        warm = _in_state(running, "WARM")
        (victim,) = _in_state(running, "ACTIVE")
        call, received = stream(running, TOKENS, temperature=0), []
        read(call, received, 100)
        os.kill(victim["pid"], signal.SIGKILL)
        read(call, received, TOKENS)

        assert received == expected
        assert warm[0]["pid"] in {m["pid"] for m in _in_state(running, "ACTIVE")}


def test_a_gateway_of_two_ranks_outlives_the_controller_that_started_it() -> None:
    with served("--tensor-parallel", "2", "--expert-workers", "0") as running:
        (gateway,), first = running.members("GATEWAY"), _controller(running)
        call, received = stream(running, TOKENS, temperature=0), []
        read(call, received, 20)
        os.kill(first.pid, signal.SIGKILL)
        read(call, received, TOKENS)
        second = first
        for _ in range(120):
            second = _controller(running) or first
            if second.pid != first.pid:
                break
            time.sleep(0.5)
        assert second.incarnation > first.incarnation
        assert [m["pids"] for m in running.members("GATEWAY")] == [gateway["pids"]]


def _controller(cluster: Served) -> cluster_pb2.Member | None:
    """Return the controller as it tells of itself; None while it is away."""
    try:
        request = cluster_pb2.GetStatusRequest()
        view = ClusterServiceStub(cluster.channel).GetStatus(request, timeout=5).status.view
    except grpc.RpcError:
        return None
    return next(m for m in view.members if m.role == cluster_pb2.ROLE_CONTROLLER)


def _in_state(cluster: Served, state: str) -> list[dict]:
    """Return the gateways in a state, once there is one."""
    for _ in range(120):
        found = [m for m in cluster.members("GATEWAY") if m["state"] == f"MEMBER_STATE_{state}"]
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError(cluster.status())
