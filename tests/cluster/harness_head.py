"""A Ray head of its own, whose GCS can be killed and started again where it left off."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

START_S = 60.0
_RAY = (str(Path(sys.executable).parent / "ray"),)
_STORE_BYTES = 90_000_000
IDLE_S = 6.0  # after which Ray's autoscaler takes a node
HEAD_ID = "f" * 51 + "00000"
AUTOSCALER_ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


@dataclass
class Head:
    """A running head; `address` and `client_address` are what `--ray-address` takes."""

    address: str
    client_address: str
    directory: Path
    environment: Mapping[str, str]

    def join(
        self,
        host: str,
        resources: Mapping[str, float],
        inside: Sequence[str],
        labels: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start a node of this cluster that is reached at `host`; `inside` goes before commands."""
        named = [f"--labels={','.join(f'{k}={v}' for k, v in labels.items())}"] if labels else []
        _started([*inside, *self._node(host, resources), *named], self.environment)

    def join_in_foreground(
        self, host: str, resources: Mapping[str, float], **environment: str
    ) -> subprocess.Popen:
        """Start a node that drains and ends on SIGTERM, as a container's command does."""
        return subprocess.Popen(
            [*self._node(host, resources), "--block"], env={**self.environment, **environment},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _node(self, host: str, resources: Mapping[str, float]) -> list[str]:
        return [
            *_RAY, "start", f"--address={self.address}", f"--node-ip-address={host}",
            "--num-cpus=2", f"--object-store-memory={_STORE_BYTES}",
            f"--resources={json.dumps(dict(resources))}",
        ]  # fmt: skip

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
        """Return the head's processes: all name its directory, but the client server its port."""
        client_port = self.client_address.rpartition(":")[2]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                serves_clients = "ray.util.client.server" in line and f"={client_port} " in line
                if str(self.directory) in line or serves_clients:
                    found.append(process)
        return [p for p in found if p.pid != os.getpid()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ray_head(
    storage: str,
    *,
    host: str = "127.0.0.1",
    resources: Mapping[str, float] | None = None,
    inside: Sequence[str] = (),
    ports: tuple[int, int] | None = None,
    node_types: Mapping[str, dict] | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Head]:
    """Run a head whose GCS keeps its tables in `rocksdb`, a `redis` of its own, or `memory`.

    `inside` goes before its command, such as what enters a network namespace. `ports` are those of
    the GCS and of the client server. With `node_types` Ray's own autoscaler (v2) runs beside it and
    brings and takes nodes of these types, each a raylet on this machine. `environment` is laid over
    this process's.
    """
    directory = Path(tempfile.mkdtemp(prefix="head-"))
    environment = {
        **os.environ,
        **environment,
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
    elif storage == "rocksdb":
        environment["RAY_gcs_storage"] = "rocksdb"
        environment["RAY_gcs_storage_path"] = str(directory / "tables")
    port, client_port = ports or (free_port(), free_port())
    head = Head(f"{host}:{port}", f"ray://{host}:{client_port}", directory, environment)
    command = [
        *inside, *_RAY, "start", "--head", f"--port={port}", f"--node-ip-address={host}",
        "--num-cpus=2", "--include-dashboard=false", f"--object-store-memory={_STORE_BYTES}",
        f"--temp-dir={directory}/t", f"--ray-client-server-port={client_port}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--resources={json.dumps(dict(resources or {}))}",
    ]  # fmt: skip
    if node_types is not None:
        environment |= AUTOSCALER_ENVIRONMENT
        config = directory / "autoscaling.json"
        config.write_text(json.dumps(_autoscaling(head.address, node_types)))
        command.append(f"--autoscaling-config={config}")
    try:
        _started(command, environment)
        yield head
    finally:
        for process in head.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if redis is not None:
            redis.kill()
            redis.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


def _autoscaling(address: str, node_types: Mapping[str, dict]) -> dict:
    """Return a cluster's description for Ray's provider that runs raylets for nodes."""
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup")
    starts = ("head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "local",
        "max_workers": 32,
        "available_node_types": {**node_types, "ray.head.default": head},
        "head_node_type": "ray.head.default",
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": address,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 4.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in (*commands, *starts)},
    }


def _started(command: Sequence[str], environment: Mapping[str, str]) -> None:
    ended = subprocess.run(
        command, env=dict(environment), check=False, capture_output=True, text=True, timeout=START_S
    )
    assert ended.returncode == 0, (
        f"{' '.join(command)}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}"
    )


def _wait_for(port: int) -> None:
    deadline_s = time.perf_counter() + START_S
    while time.perf_counter() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")
