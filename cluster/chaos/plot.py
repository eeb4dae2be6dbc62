"""The stalls of a run as a picture: how long, by kind of fault, and when."""

import importlib.util
from pathlib import Path

from cluster.chaos.run import Run
from cluster.chaos.stalls import stalls_by_kind
from workers.errors import ConfigError


def plot_stalls(run: Run, path: Path) -> None:
    """Draw the share of sequences whose stall was shorter, one curve for each kind of fault.

    Raises ConfigError when matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'expertmesh[plot]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for stalls in stalls_by_kind(run.answers, [done.window for done in run.done]):
        values = [1000 * max(s, 1e-4) for s in stalls.sequences_s]
        share = [(i + 1) / len(values) for i in range(len(values))]
        axes.step(values, share, where="post", label=f"{stalls.kind} ({len(stalls.worst_s)})")
    axes.set_xscale("log")
    axes.set_xlabel("stall of a sequence beyond its normal gap, ms")
    axes.set_ylabel("share of sequences with a shorter one")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)
