"""The client library on a real cluster whose front doors, connections and gateways are killed.

`make accept-frontdoors` is the long form.
"""

import asyncio

import pytest

from tests.accept.frontdoors import arguments, command_of, harm, judged
from tests.cluster.harness_serve import served

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_dead_front_doors_connections_and_gateways_cost_the_library_no_token() -> None:
    options = arguments(
        ["--kills", "1", "--cuts", "2", "--doubles", "1", "--workers", "0", "--concurrency", "8"]
    )
    print(f"seed {options.seed}")
    with served(*command_of(options)) as cluster:
        havocked = asyncio.run(harm(cluster.endpoint, options))

    report = judged(havocked, options)
    print(report)
    assert report["problems"] == {"lost": [], "refused": [], "out_of_order": [], "short": []}
    assert report["replay"]["wrong"] == 0
    assert report["resumed_calls"] > 0
    assert report["doubles"]["hit"] == 1
    assert report["passed"]
