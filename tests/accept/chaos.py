"""A real cluster is harmed under load, and no client may be able to tell.

    python -m tests.accept.chaos faults [--gateways 1] [--kills 300 --joins 100 ...] [--json FILE]
    python -m tests.accept.chaos walk | last-copy | controller

`faults` kills, freezes, adds and drains expert workers at random moments. `walk` takes gateways x
workers through 1x3, 1x4, 2x4, 2x2, 1x5 and 1x1. `last-copy` kills two workers at once, and, with a
floor of 1, single ones: rows are parked until the lost experts are loaded elsewhere. `controller`
kills the controller again and again. Each replays every sequence through the experts in one
process.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from cluster.chaos.faults import Fault, Saboteur
from cluster.chaos.run import ChaosOptions, report_of, run_chaos, run_script
from cluster.cli.chaos import table_of
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from tests.cluster.harness_serve import served
from workers.clock import SystemClock

WALK = ((1, 3), (1, 4), (2, 4), (2, 2), (1, 5), (1, 1))
SETTLE_S = 3.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["faults", "walk", "last-copy", "controller"])
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floor", type=int, default=2)
    parser.add_argument("--standby", type=int, default=1)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--joins", type=int, default=100)
    parser.add_argument("--drains", type=int, default=100)
    parser.add_argument("--freezes", type=int, default=50)
    parser.add_argument("--count", type=int, default=50, help="of walk, last-copy and controller")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--bit-stable", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def counts_of(options: argparse.Namespace) -> dict[Fault, int]:
    if options.what == "controller":
        return {Fault.KILL_CONTROLLER: options.count}
    if options.what == "last-copy":
        single = options.count if options.floor == 1 else 0
        return {Fault.KILL: single, Fault.KILL_TWO: options.count - single}
    return {
        Fault.KILL: options.kills,
        Fault.JOIN: options.joins,
        Fault.DRAIN: options.drains,
        Fault.FREEZE: options.freezes,
    }


async def walk(saboteur: Saboteur) -> None:
    """Take the cluster through all of `WALK`, and wait at each until it is whole."""
    for gateways, workers in WALK:
        for role, count in ((pb.ROLE_GATEWAY, gateways), (pb.ROLE_EXPERT_WORKER, workers)):
            await saboteur.scale_to(role, count)
        await asyncio.sleep(SETTLE_S)


def main() -> None:
    options = arguments()
    console = Console(highlight=False, width=120)
    chaos = ChaosOptions(
        counts=counts_of(options), concurrency=options.concurrency, seed=options.seed
    )
    walking = options.what == "walk"
    command = [
        "--model", "demo", "--allow-chaos",
        "--gateways", str(1 if walking else options.gateways),
        "--expert-workers", str(WALK[0][1] if walking else options.workers),
        "--set", f"experts.floor={options.floor}", "--set", "experts.min=1",
        "--set", f"experts.standby={options.standby}",
        "--set", f"dispatch.bit_stable={str(options.bit_stable).lower()}",
    ]  # fmt: skip
    print(f"seed {options.seed}; expertmesh serve {' '.join(command)}", flush=True)
    with served(*command) as cluster:

        def progress(done: Any) -> None:
            names = " ".join(done.members)
            print(f"{done.window.kind} {names}: whole after {done.whole_after_s:.1f} s", flush=True)

        clock = SystemClock()
        work = (
            run_script(cluster.endpoint, chaos, walk, clock=clock, progress=progress)
            if walking
            else run_chaos(cluster.endpoint, chaos, clock=clock, progress=progress)
        )
        run = asyncio.run(work)
    report = report_of(run, chaos, demo_model_path(), bit_stable=options.bit_stable)
    report |= {"what": options.what, "options": {k: str(v) for k, v in vars(options).items()}}
    console.print(table_of(report))
    print(orjson.dumps(report["machine"]).decode())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    if options.plot:
        from cluster.chaos.plot import plot_stalls

        plot_stalls(run, options.plot)
    for kind, found in report["problems"].items():
        for problem in found:
            print(f"{kind}: {problem}")
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
