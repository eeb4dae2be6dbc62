"""`expertmesh chaos`: faults in a running cluster under load, and whether a client could tell."""

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.console import Console
from rich.table import Table

from cluster.chaos.faults import Done
from cluster.chaos.run import ChaosOptions, report_of, run_chaos
from cluster.cli.client import Server
from workers.clock import SystemClock
from workers.errors import ExpertmeshError


def chaos_command(
    server: Server,
    options: ChaosOptions,
    *,
    model_dir: Path | None,
    bit_stable: bool,
    report_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Run, print and write the report.

    Raises ExpertmeshError when a request was lost, refused or changed.
    """
    console = Console(highlight=False)
    total = sum(options.counts.values())
    done_so_far: list[Done] = []

    def progress(done: Done) -> None:
        done_so_far.append(done)
        console.print(
            f"{len(done_so_far)}/{total} {' '.join((done.window.kind, *done.members))}: "
            f"all members serve, and all copies are there, after {done.whole_after_s:.1f} s",
            style="dim",
        )

    run = asyncio.run(
        run_chaos(
            server.address,
            options,
            connect=lambda address: replace(server, address=address).aio_channel(),
            clock=SystemClock(),
            progress=progress,
        )
    )
    torch.set_num_threads(1)  # threads that wait for each other stand still on a busy machine
    report = report_of(run, options, model_dir, bit_stable=bit_stable)
    console.print(table_of(report))
    if report_path is not None:
        report_path.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    if plot_path is not None:
        from cluster.chaos.plot import plot_stalls

        plot_stalls(run, plot_path)
    if not report["passed"]:
        raise ExpertmeshError(
            f"clients could tell: {report['num_problems']} problems, "
            f"{report['replay']['wrong']} sequences with wrong tokens"
        )


def table_of(report: dict[str, Any]) -> Table:
    """Return the report as a table."""
    replay = report["replay"]
    table = Table(
        title=(
            f"{report['requests']} requests, {report['tokens']} tokens, "
            f"{report['num_problems']} lost, refused, short or out of order; of "
            f"{replay['sequences']} replayed sequences {replay['wrong']} wrong, "
            f"{replay['explained_mismatches']} tokens explained by a margin"
        ),
        caption=_recoveries(report["recoveries_s"]) + _late(report["longest_deadline_s"]),
        caption_justify="left",
        title_justify="left",
    )
    for column in ("fault", "times", "stall p50", "p99", "max", "worst p50", "whole again p50"):
        table.add_column(column)
    for kind, stall in report["stalls_ms"].items():
        worst = report["worst_stall_of_a_fault_ms"][kind]
        whole = report["whole_after_s"].get(kind)
        table.add_row(
            kind,
            str(worst["count"]),
            *(f"{stall[p]:.0f} ms" for p in ("p50", "p99", "max")),
            f"{worst['p50']:.0f} ms",
            f"{whole['p50']:.1f} s" if whole else "",
        )
    return table


def _late(deadline_s: float) -> str:
    """Return the longest deadline that a worker missed, on a line of its own."""
    if not deadline_s:
        return ""
    return f"\nthe longest deadline that a worker missed was {deadline_s:.3f} s"


def _recoveries(recoveries: dict[str, Any]) -> str:
    """Return how soon layers were complete once a loss of their rows was noticed."""
    layers = recoveries["layers"]
    total = sum(layers)
    if not total:
        return "no layer lost rows"
    names = [f"{1000 * s:g} ms" if s else "longer" for s in recoveries["at_most"]]
    upto = itertools.accumulate(layers)
    shares = [
        f"{n / total:.1%} in {name}" for n, name, k in zip(upto, names, layers, strict=True) if k
    ]
    return f"{total} layers lost rows; complete after the loss was noticed: {', '.join(shares)}"
