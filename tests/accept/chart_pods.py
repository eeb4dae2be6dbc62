"""Pods of the rendered chart as processes: a network namespace and file systems of its own each.

What KubeRay and the kubelet would do is done here by hand: `ray start` is generated from a group's
parameters, variables are expanded, names of Services are written to /etc/hosts.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.cluster.harness_hosts import Host
from tests.helm.harness_helm import ROOT

_TOKEN = "a-token-that-kuberay-would-make-0123456789abcdef"
_PROBE_S = 5.0
_LAYERS = "/run/netns/layers"  # a file system in memory that ends with the hosts
# The file systems of a container, then its command.
_CONTAINER = (
    'for d in "$1" "$HOME"; do mkdir -p "$d"; mount -t tmpfs tmpfs "$d"; done; shift; exec "$@"'
)


@dataclass
class Pod:
    """One running container of a pod, on its host."""

    name: str
    host: Host
    container: Mapping[str, Any]
    process: "subprocess.Popen[bytes]"
    grace_s: float
    log: Path

    def probe(self, kind: str) -> bool:
        """Ask what the kubelet would ask: the probe `kind`, such as livenessProbe."""
        probe = self.container[kind]
        if "grpc" in probe:
            return _serves(self.host.address, probe["grpc"]["port"], probe["grpc"]["service"])
        asked = probe["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        url = f"http://{self.host.address}:{ports[asked['port']]}{asked['path']}"
        try:
            with urllib.request.urlopen(url, timeout=_PROBE_S) as answer:
                return bool(200 <= answer.status < 400)
        except OSError:
            return False

    def terminate(self) -> float:
        """Send SIGTERM as the kubelet does, and return how long the container takes to end."""
        began_s = time.perf_counter()
        self.process.terminate()
        self.process.wait(self.grace_s)
        return time.perf_counter() - began_s


def generated_start(group: Mapping[str, Any], head: str) -> str:
    """Return the command that KubeRay generates for a group; `head` is empty for the head's own."""
    parameters = dict(group["rayStartParams"])
    if head:
        parameters["address"] = f"{head}:6379"
    else:
        parameters["no-monitor"] = "true"
    labels = group.get("labels")
    if labels:
        parameters["labels"] = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
    custom = {name: float(amount) for name, amount in group["resources"].items()}
    parameters["resources"] = shlex.quote(json.dumps(custom))
    limits = group["template"]["spec"]["containers"][0]["resources"].get("limits", {})
    if "cpu" in limits:
        parameters.setdefault("num-cpus", limits["cpu"])
    words = [f"--{k}" if v == "true" else f"--{k}={v}" for k, v in parameters.items()]
    return f"ray start {'' if head else '--head '}{' '.join(words)} --block"


def started(
    name: str,
    host: Host,
    spec: Mapping[str, Any],
    directory: Path,
    *,
    more: Mapping[str, str],
) -> Pod:
    """Start the first container of a pod's specification on a host."""
    container = spec["containers"][0]
    packages = os.environ.get("IMAGE_PACKAGES", "")
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), packages])),
        "OMP_NUM_THREADS": "1",
        "GRPC_DNS_RESOLVER": "native",  # there is /etc/hosts, and no server of names
        "RAY_AUTH_TOKEN": _TOKEN,
        **more,
        **{e["name"]: _expanded(e["value"], {}) for e in container["env"] if "value" in e},
    }
    command = [*container["command"], *(_expanded(a, environment) for a in container["args"])]
    log = directory / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*host.inside, "unshare", "--mount", "/bin/bash", "-c", _CONTAINER, "-", "/tmp",
             *command],
            env=environment, stdout=output, stderr=subprocess.STDOUT, cwd="/",
        )  # fmt: skip
    return Pod(
        name, host, container, process, float(spec.get("terminationGracePeriodSeconds", 30)), log
    )


def let_files_be_written(*directories: str) -> None:
    """Let files be made below these directories, in this mount namespace only."""
    for directory in directories:
        upper, work = (Path(f"{_LAYERS}/{layer}{directory}") for layer in ("upper", "work"))
        for path in (upper, work):
            path.mkdir(parents=True)
        options = f"lowerdir={directory},upperdir={upper},workdir={work}"
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, directory], check=True, timeout=10
        )


def let_names_be_found(addresses: Mapping[str, str]) -> None:
    """Let the names of Services be found, as DNS would."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    Path("/etc/hosts").write_text("\n".join(lines) + "\n")
    Path("/etc/resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    """Expand $(NAME) as Kubernetes does; what is not known stays."""
    return re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), text)


def _serves(address: str, port: int, service: str) -> bool:
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=_PROBE_S
            )
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def all_true(pods: Sequence[Pod], kind: str) -> dict[str, bool]:
    """Return the answer of each pod's probe."""
    return {pod.name: pod.probe(kind) for pod in pods}
