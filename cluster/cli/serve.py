"""`expertmesh serve`: a cluster in the foreground."""

import signal
import sys
import threading
from collections import Counter
from types import FrameType

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.control.status import ClusterStatus
from cluster.serving import RunningCluster, serving
from workers.clock import SystemClock
from workers.errors import UnavailableError

_WATCH_S = 1.0


class Stop(Exception):  # noqa: N818 - not an error: a signal's way out of whatever is waited for
    """A signal asks the command to end."""


class Signals:
    """SIGINT and SIGTERM, turned into a `Stop` at the next wait."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def wait(self, seconds: float) -> None:
        """Sleep, or raise Stop as soon as a signal has come."""
        if self._asked.wait(seconds):
            raise Stop

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt  # asked twice: the drain is cut short
        self._asked.set()


def serve_command(config: ClusterConfig, ray_address: str | None) -> None:
    """Run until a signal comes; members are drained before the command returns."""
    console = Console(stderr=True)
    signals = Signals()
    progress = Progress(console)
    try:
        with serving(
            config,
            clock=SystemClock(),
            wait=signals.wait,
            ray_address=ray_address,
            progress=progress,
        ) as cluster:
            console.print(f"logs in {cluster.log_directory}", style="dim", highlight=False)
            sys.stdout.write(f"ready {cluster.endpoint}\n")
            sys.stdout.flush()
            said = ""
            while True:
                signals.wait(_WATCH_S)
                problem = _problem(cluster)
                if problem != said:
                    said = problem
                    console.print(problem or "all is well again", style="dim", highlight=False)
    except Stop:
        console.print("drained and ended", style="dim")


def _problem(cluster: RunningCluster) -> str:
    """Say what is wrong; requests run on while the controller is away."""
    try:
        status = cluster.status()
    except UnavailableError as error:
        return f"nothing changes, and whoever still runs serves on: {error}"
    return f"not as it should be: {'; '.join(status.reasons)}" if status.reasons else ""


class Progress:
    """Prints how far the members are, one line whenever something has changed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __call__(self, status: ClusterStatus) -> None:
        """Show a status if it says something new."""
        phases = Counter((m.member.role.value, m.phase) for m in status.members)
        text = ", ".join(f"{n} {role} {phase}" for (role, phase), n in sorted(phases.items()))
        if text and status.reasons and all(m.phase == "serve" for m in status.members):
            text += f"; {status.reasons[0]}"
        if text and text != self._last:
            self._last = text
            self._console.print(text, style="dim", highlight=False, soft_wrap=True)
