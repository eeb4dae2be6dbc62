"""Hosts on one machine: network namespaces on a switch, from which each can be cut.

For a process that `in_namespaces_of_its_own` started: everything ends with it.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SWITCH = "switch"
_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def are_possible() -> bool:
    """Whether this user may make hosts, and the tools for it are there."""
    if not all(shutil.which(tool) for tool in ("unshare", "ip", "mount")):
        return False
    return subprocess.run(["unshare", *_NAMESPACES, "true"], check=False).returncode == 0


def in_namespaces_of_its_own(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a Python module where it may make hosts."""
    return ["unshare", *_NAMESPACES, sys.executable, "-m", module, *arguments]


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace with one address."""

    number: int

    @property
    def address(self) -> str:
        """Where the other hosts, and whoever made them, reach it."""
        return f"10.77.0.{1 + self.number}"

    @property
    def inside(self) -> tuple[str, ...]:
        """What goes before a command that is to run on this host."""
        return ("ip", "netns", "exec", f"host-{self.number}")

    def cut(self) -> None:
        """Let no packet in or out; nobody is told, as when a cable is pulled beyond a switch."""
        _ip("link", "set", f"port-{self.number}", "nomaster")

    def mend(self) -> None:
        """Let packets through again."""
        _ip("link", "set", f"port-{self.number}", "master", _SWITCH)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make hosts that reach each other and are reached from here."""
    Path("/run/netns").mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run/netns"], check=True, timeout=10)
    _ip("link", "set", "lo", "up")
    _ip("link", "add", _SWITCH, "type", "bridge")
    _ip("addr", "add", "10.77.0.254/24", "dev", _SWITCH)
    _ip("link", "set", _SWITCH, "up")
    made = [Host(number) for number in range(count)]
    for host in made:
        name, port = f"host-{host.number}", f"port-{host.number}"
        _ip("netns", "add", name)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "route", "add", "default", "via", "10.77.0.254")
        _ip("link", "set", port, "up")
        host.mend()
    yield made


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10)
