"""A host is cut off in the short form; `make accept-cuts` is the long one."""

import subprocess

import pytest

from tests.cluster.harness_hosts import are_possible, in_namespaces_of_its_own

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.mark.skipif(not are_possible(), reason="network namespaces need root, unshare, ip, mount")
def test_a_host_that_is_cut_off_for_seconds_goes_on_with_the_same_processes() -> None:
    command = in_namespaces_of_its_own(
        "tests.accept.cuts", "--short", "1", "--long", "0", "--concurrency", "4", "--inside"
    )
    ended = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False)

    print(ended.stdout[-5000:], ended.stderr[-3000:])
    assert ended.returncode == 0
    assert "cut 3 s" in ended.stdout
