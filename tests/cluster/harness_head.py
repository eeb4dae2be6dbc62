"""A Ray head of its own, whose GCS can be killed and started again where it left off."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

START_S = 60.0


@dataclass
class Head:
    """A running head; `address` is what `--ray-address` takes."""

    address: str
    directory: Path

    def kill_gcs(self) -> tuple[list[str], dict[str, str], str]:
        """SIGKILL the GCS; returns how to start it again."""
        (gcs,) = [p for p in self.processes() if p.name().startswith("gcs_server")]
        again = gcs.cmdline(), gcs.environ(), gcs.cwd()
        gcs.kill()
        gcs.wait(10)
        return again

    def start_gcs(self, again: tuple[list[str], dict[str, str], str]) -> None:
        """Start the GCS as it was started before, as a supervisor would."""
        command, environment, directory = again
        subprocess.Popen(
            command, env=environment, cwd=directory, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Return the head's processes, which all name its directory."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.directory) in " ".join(process.cmdline()):
                    found.append(process)
        return [p for p in found if p.pid != os.getpid()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ray_head(storage: str) -> Iterator[Head]:
    """Run a head whose GCS keeps its tables in `rocksdb` or in a `redis` of its own."""
    directory = Path(tempfile.mkdtemp(prefix="head-"))
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "180",
    }
    redis = None
    if storage == "redis":
        port = free_port()
        redis = subprocess.Popen(
            ["redis-server", "--port", str(port), "--dir", str(directory), "--appendonly", "yes"],
            stdout=subprocess.DEVNULL,
        )
        environment["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{port}"
        _wait_for(port)
    else:
        environment["RAY_gcs_storage"] = "rocksdb"
        environment["RAY_gcs_storage_path"] = str(directory / "tables")
    port = free_port()
    head = Head(f"127.0.0.1:{port}", directory)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false",
        "--object-store-memory=90000000", f"--temp-dir={directory}/t",
        f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=START_S)
        yield head
    finally:
        for process in head.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if redis is not None:
            redis.kill()
            redis.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for(port: int) -> None:
    deadline_s = time.perf_counter() + START_S
    while time.perf_counter() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")
