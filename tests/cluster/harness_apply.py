"""A cluster that `expertmesh apply` started on a Ray head of its own, and its commands."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from tests.cluster.harness_head import Head, free_port, ray_head

COMMAND_S = 240.0
RESOURCES = {"gateway": 4, "frontdoor": 4, "expert_slot": 16}


@dataclass
class Site:
    """A Ray head, the configuration's file, and where the cluster serves."""

    head: Head
    config: Path
    endpoint: str
    journal: Path

    def run(self, *arguments: str, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess:
        """Run a command of `expertmesh`."""
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def apply(self, *more: str) -> subprocess.CompletedProcess:
        return self.run("apply", "-f", str(self.config), *self.address, *more)

    def rollout(self) -> subprocess.CompletedProcess:
        return self.run("rollout", "-f", str(self.config), *self.address)

    def down(self) -> subprocess.CompletedProcess:
        return self.run("down", *self.address)

    @property
    def address(self) -> tuple[str, str]:
        return ("--ray-address", self.head.address)

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change values in the file, by dotted keys."""
        tree = yaml.safe_load(self.config.read_text())
        for key, value in changes.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
        self.config.write_text(yaml.safe_dump(tree))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "expertmesh", *arguments]


@contextlib.contextmanager
def site(
    storage: str = "memory",
    *,
    resources: Mapping[str, float] = RESOURCES,
    node_types: Mapping[str, dict] | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    **changes: Any,
) -> Iterator[Site]:
    """Run a Ray head and write a configuration; the cluster, if it was applied, is taken down.

    `resources`, `node_types` and `environment` are as in `ray_head`.
    """
    with (
        tempfile.TemporaryDirectory(prefix="apply-") as directory,
        ray_head(
            storage, resources=resources, node_types=node_types, environment=environment
        ) as head,
    ):
        endpoint = f"127.0.0.1:{free_port()}"
        journal = Path(directory) / "journal"
        made = Site(head, Path(directory) / "config.yaml", endpoint, journal)
        made.config.write_text("{}")
        made.configure(
            {
                "front_doors.listen": endpoint,
                "control.journal": str(journal),
                "experts.min": 1,
                **changes,
            }
        )
        yield made
