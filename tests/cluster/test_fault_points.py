"""A real cluster whose gateways kill themselves at each named point, once, under a small load."""

import pytest

from cluster.chaos.run import ChaosOptions
from tests.accept.fault_points import Place, judged, run_places
from tests.cluster.harness_serve import served
from tests.injection.fault_points import POINTS, Trap

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

LOAD = ChaosOptions(counts={}, concurrency=4)


def test_a_gateway_dies_at_every_point_and_no_client_can_tell(tmp_path, monkeypatch):
    trap, places = Trap(tmp_path), [Place(point, rank=0) for point in POINTS]
    for name, value in trap.environment.items():
        monkeypatch.setenv(name, value)
    with served(
        "--model", "demo", "--allow-chaos", "--gateways", "2", "--expert-workers", "2",
        "--set", "experts.floor=1", "--set", "experts.min=1",
        "--set", "gateways.standby=1", "--set", "gateways.snapshot_tokens=16",
    ) as cluster:  # fmt: skip
        run, kills = run_places(cluster.endpoint, trap, places, LOAD)

    report = judged(run, kills, places, LOAD, bit_stable=False)

    assert not report["num_problems"], report["problems"]
    assert not report["replay"]["wrong"], report["replay"]
    assert [kill.met.point for kill in kills] == list(POINTS)
    assert report["passed"], report
