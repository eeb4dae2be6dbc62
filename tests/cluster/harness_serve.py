"""Starts the real `expertmesh serve` as a child and talks to it over gRPC."""

import contextlib
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
import psutil

from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub

START_S = 240.0


@dataclass
class Served:
    """A running cluster and a channel to it."""

    process: subprocess.Popen
    endpoint: str
    channel: grpc.Channel

    @property
    def inference(self) -> InferenceServiceStub:
        return InferenceServiceStub(self.channel)

    def status(self) -> dict:
        """Return `expertmesh status --json`."""
        command = [
            sys.executable,
            "-m",
            "expertmesh",
            "status",
            "--json",
            "--server",
            self.endpoint,
        ]
        return json.loads(
            subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        )

    def members(self, role: str) -> list[dict]:
        return [m for m in self.status()["members"] if m["role"] == f"ROLE_{role}"]

    def metrics(self, member: dict) -> dict[str, float]:
        """Return the series of a member's page, name and labels as written there."""
        with urllib.request.urlopen(f"http://{member['metrics']}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        series = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in series}

    def generate(
        self, text: str = "In the beginning", *, timeout_s: float = 60, **more
    ) -> list[pb.GenerateResponse]:
        sampling = pb.Sampling(temperature=more.pop("temperature", 0), seed=more.pop("seed", None))
        stopping = pb.Stopping(max_tokens=more.pop("max_tokens", 12), ignore_eos=True)
        request = pb.GenerateRequest(text=text, sampling=sampling, stopping=stopping, **more)
        return list(self.inference.Generate(request, timeout=timeout_s))


def token_ids(responses: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    return [t for r in responses if r.sequence_index == index for t in r.token_ids]


def descendants(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


@contextlib.contextmanager
def served(*options: str, host: str = "127.0.0.1", inside: Sequence[str] = ()) -> Iterator[Served]:
    """Run `expertmesh serve` with a free port; it is ended by SIGTERM.

    `inside` goes before the command, such as what enters a network namespace.
    """
    command = [
        *inside, sys.executable, "-m", "expertmesh", "serve", "--listen", f"{host}:0", *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        endpoint = _ready(process)
        with grpc.insecure_channel(endpoint) as channel:
            yield Served(process, endpoint, channel)
    finally:
        if process.poll() is None:
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.poll() is None:
            process.kill()
            process.wait(30)
        process.stdout.close()
        process.stderr.close()


def _ready(process: subprocess.Popen) -> str:
    """Return the endpoint of the `ready` line; the only line that stdout carries."""
    alarm = threading.Timer(START_S, process.terminate)
    alarm.start()
    line = process.stdout.readline()
    alarm.cancel()
    if not line.startswith("ready "):
        process.terminate()
        raise AssertionError(f"serve did not start: {line!r} {process.stderr.read()[-4000:]}")
    return line.split()[1]
