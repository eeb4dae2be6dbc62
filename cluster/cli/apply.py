"""`expertmesh apply`, `rollout` and `down`: a cluster on a Ray cluster that is there already."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cluster.applying import (
    Applied,
    apply,
    connected,
    roll_out,
    running_config,
    take_down,
)
from cluster.cli.serve import Progress, Signals, Stop
from cluster.config import ClusterConfig, load_config
from cluster.control.status import ClusterStatus
from cluster.runtime.nodes import head_address
from workers.clock import SystemClock
from workers.errors import ExpertmeshError

_LOOK_S = 2.0
_RETRY_S = (1.0, 30.0)  # between attempts: at first, and at most
_SILENT_S = 30.0  # without a word of the controller, after which it is looked for anew
_END_S = 10.0

Load = Callable[[], ClusterConfig]


def apply_command(load: Load, address: str) -> None:
    """Bring the cluster to the configuration and print where it serves."""
    signals = Signals()
    try:
        config = load()
        with connected(address, config):
            _report(_apply(config, signals))
    except Stop:
        raise ExpertmeshError("interrupted; what was started goes on to start") from None


def rollout_command(load: Load | None, address: str, timeout_s: float) -> None:
    """Replace the members whose settings are outdated; without `load`, what runs is kept."""
    signals, console = Signals(), Console(stderr=True)
    try:
        with connected(address):
            applied = _apply(load() if load else running_config(), signals)
            count = roll_out(
                applied.controller,
                timeout_s=timeout_s,
                clock=SystemClock(),
                wait=signals.wait,
                progress=Replaced(console),
            )
    except Stop:
        raise ExpertmeshError("interrupted; the rollout goes on by itself") from None
    sys.stdout.write(f"replaced {count} members\n")


def down_command(address: str) -> None:
    """Drain and end the cluster; says first where it is, for `auto` may find one of several."""
    with connected(address):
        where = head_address() if address == "auto" else address
        Console(stderr=True).print(f"on the Ray cluster at {where}", style="dim", highlight=False)
        count = take_down()
    sys.stdout.write("ended\n" if count else "nothing ran\n")


def watch_command(path: Path, settings: list[str], address: str) -> None:
    """Apply, and apply again when the file changes or the cluster is lost, until a signal comes.

    Each attempt has a process of its own, since Ray ends those that lose its head.
    """
    signals, console = Signals(), Console(stderr=True)
    context = multiprocessing.get_context("spawn")
    pause_s = _RETRY_S[0]
    attempt = None
    try:
        while True:
            began_s = time.perf_counter()
            attempt = context.Process(target=_attempt, args=(path, settings, address))
            attempt.start()
            while attempt.is_alive():
                signals.wait(_LOOK_S / 4)
            if attempt.exitcode == 0:  # the file has changed
                pause_s = _RETRY_S[0]
                continue
            lasted_s = time.perf_counter() - began_s
            pause_s = _RETRY_S[0] if lasted_s > _SILENT_S else min(2 * pause_s, _RETRY_S[1])
            console.print(f"again in {pause_s:g} s", style="dim", highlight=False)
            signals.wait(pause_s)
    except Stop:
        console.print("the cluster goes on; `expertmesh down` ends it", style="dim")
    finally:
        if attempt is not None and attempt.is_alive():
            attempt.terminate()
            attempt.join(_END_S)
            attempt.kill()


def _attempt(path: Path, settings: list[str], address: str) -> None:
    """Apply the file, then watch it and the cluster; returns when the file has changed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    console, clock = Console(stderr=True), SystemClock()
    try:
        text = path.read_bytes()
        config = load_config(path, settings)
        with connected(address, config):
            applied = _apply(config)
            _report(applied)
            said, heard_s = "", clock.now_s()
            while _read(path) == text:
                time.sleep(_LOOK_S)
                try:
                    status = applied.controller.call("status", timeout_s=_SILENT_S)
                except ExpertmeshError as error:
                    problem = f"the controller does not answer: {error}"
                    if clock.now_s() - heard_s > _SILENT_S:
                        raise
                else:
                    heard_s = clock.now_s()
                    problem = "; ".join(status.reasons)
                if problem != said:
                    said = problem
                    console.print(problem or "all is well again", style="dim", highlight=False)
    except (ExpertmeshError, OSError) as error:
        console.print(f"expertmesh: {error}", highlight=False)
        sys.exit(1)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None  # in the middle of being replaced


def _apply(config: ClusterConfig, signals: Signals | None = None) -> Applied:
    return apply(
        config,
        clock=SystemClock(),
        wait=signals.wait if signals else time.sleep,
        progress=Progress(Console(stderr=True)),
    )


def _report(applied: Applied) -> None:
    """Say what was changed, what waits for a rollout, and where the cluster serves."""
    console = Console(stderr=True)
    found = applied.differences
    if found is not None:
        for word, texts in (("scaled", found.counts), ("changed", found.at_once)):
            for text in texts:
                console.print(f"{word}: {text}", highlight=False, markup=False)
        for text in found.by_rollout:
            console.print(f"at the next rollout: {text}", highlight=False, markup=False)
    if applied.num_outdated:
        console.print(
            f"{applied.num_outdated} members run with older settings; `expertmesh rollout` "
            "replaces them",
            highlight=False,
        )
    sys.stdout.write(f"ready {applied.endpoint}\n")
    sys.stdout.flush()


class Replaced:
    """Prints how many members are still to be replaced, whenever that has changed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __call__(self, status: ClusterStatus) -> None:
        """Show a status if it says something new."""
        old = [str(member.member.id) for member in status.members if member.outdated]
        leaving = [str(member.member.id) for member in status.members if member.leaving]
        text = f"{len(old)} to replace" + (f", {', '.join(leaving)} leaves" if leaving else "")
        if text != self._last:
            self._last = text
            self._console.print(text, style="dim", highlight=False)
