"""The chart's rendered containers as processes on hosts of their own, until one has answered.

    python -m tests.accept.chart [--json FILE]

Needs root, and the packages of helm/constraints-image.txt, which it fetches. What is measured:
probes on nodes that hold no member yet, the way to the first token, `helm test`'s container, and
SIGTERM of an expert worker's pod under load against its grace period. KubeRay and the kubelet are
stood in for.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from tests.accept.chart_pods import (
    Pod,
    all_true,
    generated_start,
    let_files_be_written,
    let_names_be_found,
    started,
)
from tests.cluster.harness_hosts import Host, are_possible, hosts, in_namespaces_of_its_own
from tests.helm.harness_helm import CHART, ROOT, manifests, named, template

_PATIENCE_S = 300.0
_VALUES = {"expertPools": {"default": {"minReplicas": 3, "maxReplicas": 4}}}
_REQUESTS = 40
_TRIES = 4
_DRAINED = "Local node finished draining"  # as Ray says it


def until(what: str, is_so: Callable[[], bool]) -> float:
    """Wait for something and return how long that took."""
    began_s = time.perf_counter()
    while not is_so():
        if time.perf_counter() - began_s > _PATIENCE_S:
            raise AssertionError(f"not within {_PATIENCE_S:g} s: {what}")
        time.sleep(0.5)
    print(f"{what}: {time.perf_counter() - began_s:.1f} s", flush=True)
    return time.perf_counter() - began_s


def alive(start: Callable[[], Pod]) -> Pod:
    """Start a pod and wait until it lives; one that ended is made anew, as KubeRay does.

    On a machine with much to do Ray gives a node up that is not there within 30 s.
    """
    for _ in range(_TRIES):
        pod = start()
        until(
            f"{pod.name} lives",
            lambda pod=pod: pod.process.poll() is not None or pod.probe("livenessProbe"),
        )
        if pod.process.poll() is None:
            return pod
    raise AssertionError(f"{pod.name} ended {_TRIES} times while it started")


def ray_pods(found: list[dict[str, Any]], made: list[Host], directory: Path) -> Iterator[Pod]:
    """Start a pod for the head and for each of a group's minReplicas, the head first."""
    cluster = named(found, "RayCluster")
    head_name = f"{cluster['metadata']['name']}-head-svc"
    free = iter(made)
    head_group = cluster["spec"]["headGroupSpec"]
    head = {
        "RAY_AUTH_MODE": "token", "KUBERAY_GEN_RAY_START_CMD": generated_start(head_group, ""),
        "RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/var/lib/expertmesh/gcs",
    }  # fmt: skip
    spec = head_group["template"]["spec"]
    yield alive(functools.partial(started, "head", next(free), spec, directory, more=head))
    for group in cluster["spec"]["workerGroupSpecs"]:
        worker = {
            "RAY_AUTH_MODE": "token",
            "KUBERAY_GEN_RAY_START_CMD": generated_start(group, head_name),
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        }
        spec = group["template"]["spec"]
        for number in range(group["minReplicas"]):
            name = f"{group['groupName']}-{number}"
            start = functools.partial(started, name, next(free), spec, directory, more=worker)
            yield alive(start)


def run_inside(options: argparse.Namespace, directory: Path) -> None:
    """Make the hosts, start everything on them, and report."""
    found = manifests(template(files=[CHART / "examples" / "cpu-smoke.yaml"], values=_VALUES))
    report: dict[str, Any] = {}
    with hosts(8) as made, contextlib.ExitStack() as ending:
        let_files_be_written("/etc", "/home", "/var/lib")
        let_names_be_found(
            {"rel-expertmesh-head-svc": made[0].address, "rel-expertmesh": made[4].address}
        )
        for path in ("/etc/expertmesh/config", "/var/lib/expertmesh/journal"):
            Path(path).mkdir(parents=True)
        config = named(found, "ConfigMap", "-expertmesh")["data"]["config.yaml"]
        Path("/etc/expertmesh/config/config.yaml").write_text(config)
        pods = list(ray_pods(found, made, directory))
        ending.callback(lambda: [pod.process.kill() for pod in pods])
        (door,) = [pod for pod in pods if pod.name.startswith("frontdoor")]
        assert door.host == made[4], "the Service's name leads elsewhere"
        report["alive_while_empty"] = all_true(pods, "livenessProbe")
        report["ready_while_empty"] = all_true(pods, "readinessProbe")
        assert all(report["alive_while_empty"].values()), report["alive_while_empty"]
        assert not report["ready_while_empty"].pop(door.name), "ready without a front door"
        assert all(report["ready_while_empty"].values())

        spec = named(found, "Deployment", "-apply")["spec"]["template"]["spec"]
        apply = started("apply", made[6], spec, directory, more={})
        ending.callback(apply.process.kill)
        report["apply_s"] = until("applied", lambda: "ready " in apply.log.read_text())
        report["door_ready_s"] = until(
            "the front door is ready", lambda: door.probe("readinessProbe")
        )

        test = named(found, "Pod", "-test")["spec"]
        report["answer"] = one_answer(test, made[7], directory)
        report["drain"] = drained_under_load(pods, made[7])
        report["answer_after"] = one_answer(test, made[7], directory)
        report["alive_at_the_end"] = all_true(
            [pod for pod in pods if pod.process.poll() is None], "livenessProbe"
        )
        report["apply_ends_s"] = apply.terminate()
    print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode(), flush=True)
    if options.json:
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))


def one_answer(spec: dict[str, Any], host: Host, directory: Path) -> str:
    """Run `helm test`'s container and return what it printed."""
    pod = started("test", host, spec, directory, more={})
    assert pod.process.wait(spec["activeDeadlineSeconds"]) == 0, pod.log.read_text()
    return pod.log.read_text()


def drained_under_load(pods: list[Pod], client: Host) -> dict[str, Any]:
    """SIGTERM a pod that holds an expert worker while requests run; all of them must succeed."""
    command = [*client.inside, str(Path(sys.executable).parent / "expertmesh")]
    server = ["--server", "rel-expertmesh:50051"]
    shown = subprocess.run(
        [*command, "status", "--json", *server], capture_output=True, check=True, timeout=60
    )
    pids = {m["name"]: m["pid"] for m in orjson.loads(shown.stdout)["members"]}
    member, pid = next((n, p) for n, p in pids.items() if n.startswith("expert_worker"))
    where = subprocess.run(
        ["ip", "netns", "identify", str(pid)], capture_output=True, text=True, check=True
    )
    number = int(where.stdout.strip().removeprefix("host-"))
    (pod,) = [pod for pod in pods if pod.host.number == number]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        load = subprocess.Popen(
            [*command, "bench", "--requests", str(_REQUESTS), "--concurrency", "4",
             "--json", file.name, *server],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(3.0)  # so that requests run
        assert load.poll() is None, "there is no load any more"
        took_s = pod.terminate()
        assert load.wait(_PATIENCE_S) == 0
        measured = orjson.loads(Path(file.name).read_bytes())
    print(f"{pod.name} with {member} ended {took_s:.1f} s after SIGTERM", flush=True)
    assert _DRAINED in pod.log.read_text(), "it ended before it was drained"
    assert not measured["errors"], measured["errors"]
    return {"pod": pod.name, "held": member, "ended_s": took_s, "grace_s": pod.grace_s,
            "requests": _REQUESTS, "errors": measured["errors"]}  # fmt: skip


def image_packages() -> Path:
    """Return a directory with what the image holds beside constraints-cpu.txt."""
    pins = ROOT / "helm" / "constraints-image.txt"
    sum_ = hashlib.sha256(pins.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"
    directory = cache / f"image-{sum_}"
    if not directory.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
             str(directory), "--requirement", str(pins)],
            check=True,
        )  # fmt: skip
    return directory


def main() -> None:
    """Start over in namespaces of its own, where everything ends with it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        run_inside(options, options.inside)
        return
    if not are_possible():
        sys.exit("needs root, and iproute2 and util-linux")
    with tempfile.TemporaryDirectory(prefix="chart-", dir="/var/tmp") as directory:
        report = ["--json", str(options.json.resolve())] if options.json else []
        command = in_namespaces_of_its_own("tests.accept.chart", "--inside", directory, *report)
        environment = {**os.environ, "IMAGE_PACKAGES": str(image_packages())}
        ended = subprocess.run(command, check=False, cwd=ROOT, env=environment)
        if ended.returncode:
            for log in sorted(Path(directory).glob("*.log")):
                print(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}", flush=True)
        sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
