"""Every member of a running cluster is replaced under load, again and again; nothing may be lost.

    python -m tests.accept.rollout [--rounds 5] [--gateways 2] [--workers 3] [--json FILE]

The cluster is started by `expertmesh apply` on a Ray head; each round changes a setting that all
roles read and runs `expertmesh rollout`. Every sequence is replayed through the experts in one
process. A client whose front door goes comes back with what it has; the report says how often.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from cluster.chaos.faults import Done, Saboteur
from cluster.chaos.run import ChaosOptions, report_of, run_script
from cluster.cli.chaos import table_of
from cluster.demo.path import demo_model_path
from tests.cluster.harness_apply import Site, site
from workers.clock import SystemClock

LEVELS = ("warning", "info")
PAUSE_S = 2.0


class RolloutError(AssertionError):
    """A rollout failed, or left somebody with old settings."""


async def members(saboteur: Saboteur) -> set[str]:
    """Return NAME.INCARNATION of every member."""
    view = (await saboteur.whole()).view
    return {f"{m.name}.{m.incarnation}" for m in view.members if m.role != 1}


async def roll(saboteur: Saboteur, cluster: Site, rounds: int) -> None:
    """Change a setting that all processes read, and replace them all; `rounds` times."""
    for number in range(rounds):
        before = await members(saboteur)
        cluster.configure({"telemetry.log_level": LEVELS[number % 2]})
        async with saboteur.fault("rollout", (f"{len(before)} members",)):
            ended = await asyncio.to_thread(cluster.rollout)
        if ended.returncode:
            raise RolloutError(f"rollout: {ended.stdout}{ended.stderr}")
        if kept := before & await members(saboteur):
            raise RolloutError(f"not replaced: {sorted(kept)}")
        await asyncio.sleep(PAUSE_S)


def run_rollouts(
    cluster: Site, options: ChaosOptions, rounds: int, progress: Any = lambda _done: None
) -> dict[str, Any]:
    """Load the cluster, roll out, and judge; returns the report."""

    async def script(saboteur: Saboteur) -> None:
        await roll(saboteur, cluster, rounds)

    run = asyncio.run(
        run_script(cluster.endpoint, options, script, clock=SystemClock(), progress=progress)
    )
    return report_of(run, options, demo_model_path())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chaos = ChaosOptions(
        counts={}, seed=options.seed, concurrency=options.concurrency, breaks_streams=True
    )
    print(f"seed {options.seed}", flush=True)

    def progress(done: Done) -> None:
        length_s = done.window.end_s - done.window.start_s
        print(f"{done.window.kind} of {done.members[0]}: {length_s:.1f} s", flush=True)

    changes = {
        "gateways.count": options.gateways,
        "experts.workers": options.workers,
        "control.allow_chaos": True,
    }
    with site(**changes) as cluster:
        started = cluster.apply()
        if started.returncode:
            raise RolloutError(f"apply: {started.stdout}{started.stderr}")
        report = run_rollouts(cluster, chaos, options.rounds, progress)
        cluster.down()
    Console(highlight=False, width=120).print(table_of(report))
    print(f"clients came back {report['resumed_calls']} times")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    for kind, found in report["problems"].items():
        for problem in found:
            print(f"{kind}: {problem}")
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
