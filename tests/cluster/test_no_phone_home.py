"""Nothing is sent anywhere: a cluster serves where there is no way out, and tries none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROBES = {"192.0.2.9", "probe.invalid"}  # the harness tries these, to know that its watch works
OWN_ADDRESSES = {"1.0.0.127.in-addr.arpa", "2.2.0.192.in-addr.arpa"}  # torch asks for their names
DEADLINE_S = 240.0


def namespace_is_possible() -> bool:
    if not all(shutil.which(tool) for tool in ("unshare", "ip", "mount")):
        return False
    return subprocess.run(["unshare", "--net", "--mount", "true"], check=False).returncode == 0


pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not namespace_is_possible(), reason="needs the right to make a network namespace, and ip"
    ),
]


def serve_in_a_namespace(way: str) -> dict:
    command = ["unshare", "--net", "--mount"]
    command += [sys.executable, "-m", "tests.cluster.harness_blackhole", way]
    ended = subprocess.run(
        command,
        check=False,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_cluster_serves_without_any_route_out():
    assert serve_in_a_namespace("sealed")["tokens"] == 8


@pytest.mark.skipif(not os.access("/dev/net/tun", os.W_OK), reason="needs /dev/net/tun")
def test_no_process_sends_a_packet_out_or_asks_for_a_name():
    report = serve_in_a_namespace("watched")
    attempts = {*report["sent_to"], *report["asked"]}

    assert report["tokens"] == 8
    assert attempts - OWN_ADDRESSES == PROBES
