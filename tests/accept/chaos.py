"""A real cluster is harmed under load, and no client may be able to tell.

    python -m tests.accept.chaos faults [--gateways 1] [--kills 300 --joins 100 ...] [--json FILE]
    python -m tests.accept.chaos walk | last-copy | controller
    python -m tests.accept.chaos gateways [--tensor-parallel 2]
    python -m tests.accept.chaos mixed [--minutes 20]

`faults` kills, freezes, adds and drains expert workers at random moments. `walk` takes gateways x
workers through 1x3, 1x4, 2x4, 2x2, 1x5 and 1x1. `last-copy` kills two workers at once, and, with a
floor of 1, single ones: rows are parked until the lost experts are loaded elsewhere. `controller`
kills the controller again and again. `gateways` kills one rank of a gateway at a time, and freezes
some. `mixed` harms both planes, front doors and connections too, often both at once, for as long as
it is told; the load's clients come back through another front door. Each replays every sequence
through the experts in one process.
"""

import argparse
import asyncio
import random
import sys
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from cluster.chaos.faults import Fault, Saboteur
from cluster.chaos.run import ChaosOptions, Run, report_of, run_chaos, run_script
from cluster.cli.chaos import table_of
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from tests.cluster.harness_serve import served
from workers.clock import Clock, SystemClock

EXPERT_FAULTS = (
    Fault.KILL, Fault.KILL, Fault.KILL_TWO, Fault.FREEZE, Fault.JOIN, Fault.DRAIN,
    Fault.KILL_CONTROLLER,
)  # fmt: skip
GATEWAY_FAULTS = (
    Fault.KILL_GATEWAY, Fault.KILL_GATEWAY, Fault.FREEZE_GATEWAY, Fault.KILL_FRONT_DOOR,
    Fault.KILL_BOTH, Fault.CUT,
)  # fmt: skip
WALK = ((1, 3), (1, 4), (2, 4), (2, 2), (1, 5), (1, 1))
SETTLE_S = 3.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=[*SCENES, "walk", "mixed"])
    parser.add_argument("--gateways", type=int)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--front-doors", type=int)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floor", type=int, default=2)
    parser.add_argument("--standby", type=int, default=1)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--joins", type=int, default=100)
    parser.add_argument("--drains", type=int, default=100)
    parser.add_argument("--freezes", type=int, default=50)
    parser.add_argument("--count", type=int, default=50, help="of the other faults")
    parser.add_argument("--minutes", type=float, default=20.0, help="of mixed")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--bit-stable", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def faults_counts(options: argparse.Namespace) -> dict[Fault, int]:
    return {
        Fault.KILL: options.kills,
        Fault.JOIN: options.joins,
        Fault.DRAIN: options.drains,
        Fault.FREEZE: options.freezes,
    }


def last_copy_counts(options: argparse.Namespace) -> dict[Fault, int]:
    single = options.count if options.floor == 1 else 0
    return {Fault.KILL: single, Fault.KILL_TWO: options.count - single}


SCENES = {
    "faults": faults_counts,
    "last-copy": last_copy_counts,
    "controller": lambda options: {Fault.KILL_CONTROLLER: options.count},
    "gateways": lambda options: {
        Fault.KILL_GATEWAY: options.count,
        Fault.FREEZE_GATEWAY: options.count // 10,
    },
}


async def mixed(saboteur: Saboteur, minutes: float, seed: int, clock: Clock) -> None:
    """Harm both planes until the time is over; each other time both at once."""
    draw = random.Random(f"{seed}/mixed")
    end_s = clock.now_s() + 60.0 * minutes
    joined = 0
    while clock.now_s() < end_s:
        expert, gateway = draw.choice(EXPERT_FAULTS), draw.choice(GATEWAY_FAULTS)
        if expert is Fault.DRAIN and not joined:
            expert = Fault.JOIN
        faults = draw.choice([(expert,), (gateway,), (expert, gateway), (expert, gateway)])
        joined += {Fault.JOIN: 1, Fault.DRAIN: -1}.get(faults[0], 0)
        await saboteur.strike(*faults)
        await asyncio.sleep(draw.uniform(0.1, 1.5))


async def walk(saboteur: Saboteur) -> None:
    """Take the cluster through all of `WALK`, and wait at each until it is whole."""
    for gateways, workers in WALK:
        for role, count in ((pb.ROLE_GATEWAY, gateways), (pb.ROLE_EXPERT_WORKER, workers)):
            await saboteur.scale_to(role, count)
        await asyncio.sleep(SETTLE_S)


def command_of(options: argparse.Namespace) -> list[str]:
    """Return the arguments of `expertmesh serve`."""
    scene = options.what
    several = scene in {"gateways", "mixed"}
    gateways = options.gateways or (2 if several else 1)
    front_doors = options.front_doors or (2 if several else 1)
    return [
        "--model", "demo", "--allow-chaos",
        "--gateways", str(1 if scene == "walk" else gateways),
        "--tensor-parallel", str(options.tensor_parallel),
        "--expert-workers", str(WALK[0][1] if scene == "walk" else options.workers),
        "--set", f"front_doors.count={front_doors}",
        "--set", f"experts.floor={options.floor}", "--set", "experts.min=1",
        "--set", f"experts.standby={options.standby}",
        "--set", f"dispatch.bit_stable={str(options.bit_stable).lower()}",
    ]  # fmt: skip


async def harm(endpoint: str, options: argparse.Namespace, chaos: ChaosOptions) -> Run:
    """Run the load and the scene's faults."""
    clock = SystemClock()

    def progress(done: Any) -> None:
        names = " ".join(done.members)
        print(f"{done.window.kind} {names}: whole after {done.whole_after_s:.1f} s", flush=True)

    async def script(saboteur: Saboteur) -> None:
        if options.what == "walk":
            await walk(saboteur)
        else:
            await mixed(saboteur, options.minutes, options.seed, clock)

    if options.what in SCENES:
        return await run_chaos(endpoint, chaos, clock=clock, progress=progress)
    return await run_script(endpoint, chaos, script, clock=clock, progress=progress)


def main() -> None:
    options = arguments()
    console = Console(highlight=False, width=120)
    counts = SCENES[options.what](options) if options.what in SCENES else {}
    if options.what == "mixed":
        counts = dict.fromkeys((*EXPERT_FAULTS, *GATEWAY_FAULTS), 0)
    chaos = ChaosOptions(counts=counts, concurrency=options.concurrency, seed=options.seed)
    command = command_of(options)
    print(f"seed {options.seed}; expertmesh serve {' '.join(command)}", flush=True)
    with served(*command) as cluster:
        run = asyncio.run(harm(cluster.endpoint, options, chaos))
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
