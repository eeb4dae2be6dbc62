"""Ranks of gateways kill themselves at named points under load; no client may be able to tell.

    python -m tests.accept.fault_points [--tensor-parallel 1|2] [--kills-per-point 10] [--json FILE]

What each point is, `tests/injection/fault_points.py` says. Every rank is killed at every point, in
a random order. Before a gateway dies with parked rows, an expert worker is killed: with a floor of
1 the last copies of its experts are gone until they are loaded elsewhere. Every sequence is
replayed through the experts in one process.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from cluster.chaos.faults import Saboteur
from cluster.chaos.history import Answer
from cluster.chaos.run import ChaosOptions, Run, report_of, run_script
from cluster.chaos.stalls import percentile
from cluster.cli.chaos import table_of
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from tests.accept.gateway_death import Census, pids_of, serving
from tests.cluster.harness_serve import served
from tests.injection.fault_points import PARKED, POINTS, Met, Trap
from workers.clock import Clock, SystemClock

MET_S = 60.0  # in which a process that is to die at a point has come there
BUSY_S = 60.0  # in which a gateway has work
AGAIN_S = 15.0  # after which another worker is killed, where no row was parked
PAUSE_S = (0.5, 2.0)
PULSE_S = 0.5  # how often gateways say what they run
POLL_S = 0.02


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--kills-per-point", type=int, default=10, help="of each rank")
    parser.add_argument("--points", nargs="+", choices=POINTS, default=POINTS)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--standby", type=int, default=0, help="warm gateways beside them")
    # Half of what it is by itself, so that many sequences have snapshots.
    parser.add_argument("--snapshot-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--bit-stable", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is killed."""

    point: str
    rank: int

    def __str__(self) -> str:
        return f"kill at {self.point}, rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Kill:
    """A gateway that was killed, and what all gateways counted until the cluster was whole."""

    place: Place
    gateway: str
    met: Met
    counted: dict[str, int]
    whole_after_s: float


def places_of(points: Sequence[str], size: int, times: int, seed: int) -> list[Place]:
    """Return so many kills of every rank at every point, in a random order."""
    places = [Place(point, rank) for point in points for rank in range(size)] * times
    random.Random(f"{seed}/places").shuffle(places)
    return places


@dataclass
class Assassin:
    """Has gateways die at points, one after the other."""

    saboteur: Saboteur
    trap: Trap
    clock: Clock
    seed: int
    census: Census = field(default_factory=Census)
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = random.Random(f"{self.seed}/assassin")

    async def run(self, places: Sequence[Place]) -> None:
        """Kill at all places; raises TimeoutError when a process has not come to its point."""
        following = asyncio.create_task(self.census.follow(self.saboteur))
        try:
            for place in places:
                await asyncio.sleep(self._draw.uniform(*PAUSE_S))
                await self._kill(place)
        finally:
            following.cancel()

    async def _kill(self, place: Place) -> None:
        self.census.note(await self.saboteur.whole())
        before = Counter(self.census.total())
        victim = await self._busy()
        dead = [name_of(victim)]
        # Soon after a gateway has come most snapshots are whole ones: wait for others as often.
        least_start = self._draw.choice((0, 1))
        pid = pids_of(victim)[place.rank]
        with self.trap.armed(place.point, pid, least_start=least_start):
            met = await self._met(place, dead)
        died_s = self.clock.now_s()
        self.saboteur.must_end(pids_of(victim))
        assert (met.point, met.rank) == (place.point, place.rank), met
        async with self.saboteur.fault(str(place), (dead[0],)):
            self.census.note(await self.saboteur.whole(without=dead))
        counted = Counter(self.census.total())
        counted.subtract(before)
        kill = Kill(place, dead[0], met, dict(counted), self.clock.now_s() - died_s)
        self.kills.append(kill)
        print(f"{place}, {kill.gateway}, whole after {kill.whole_after_s:.1f} s", flush=True)

    async def _busy(self) -> pb.Member:
        """Return a gateway of a whole cluster, each as likely as it has sequences."""
        async with asyncio.timeout(BUSY_S):
            while True:
                status = await self.saboteur.whole()
                running = {name_of(m): m.gateway_stats.running for m in status.members}
                members = serving(status)
                weights = [running.get(name_of(member), 0) for member in members]
                if any(weights):
                    return self._draw.choices(members, weights)[0]
                await asyncio.sleep(PULSE_S)

    async def _met(self, place: Place, dead: list[str]) -> Met:
        """Return the word of the process that died; adds the workers that had to die for that."""
        again_s = self.clock.now_s()
        end_s = again_s + MET_S
        while (met := self.trap.met()) is None:
            if self.clock.now_s() > end_s:
                raise TimeoutError(f"{place}: {dead[0]} did not come there within {MET_S:g} s")
            if place.point == PARKED and self.clock.now_s() >= again_s:
                status = await self.saboteur.whole()
                if self.trap.met() is None:
                    dead.append(self._kill_worker(status))
                again_s = self.clock.now_s() + AGAIN_S
            await asyncio.sleep(POLL_S)
        return met

    def _kill_worker(self, status: pb.ClusterStatus) -> str:
        """Kill the expert worker with the most experts: the newest one may have none."""
        workers = [m for m in status.members if m.HasField("worker_stats")]
        fullest = max(workers, key=lambda m: m.worker_stats.slots_used)
        name = name_of(fullest)
        (pid,) = [m.pid for m in status.view.members if name_of(m) == name]
        self.saboteur.must_end([pid])
        os.kill(pid, signal.SIGKILL)
        return name


def name_of(member: pb.Member | pb.MemberHealth) -> str:
    return f"{member.name}.{member.incarnation}"


def run_places(
    endpoint: str, trap: Trap, places: Sequence[Place], chaos: ChaosOptions
) -> tuple[Run, list[Kill]]:
    """Kill at all places under load, and let the last requests finish."""
    clock, kills = SystemClock(), list[Kill]()

    async def script(saboteur: Saboteur) -> None:
        await Assassin(saboteur, trap, clock, chaos.seed, kills=kills).run(places)

    run = asyncio.run(run_script(endpoint, chaos, script, clock=clock, progress=lambda _done: None))
    return run, kills


def judged(
    run: Run,
    kills: Sequence[Kill],
    places: Sequence[Place],
    chaos: ChaosOptions,
    *,
    bit_stable: bool,
) -> dict[str, Any]:
    """Return the report; it passes if all points were met by requests, and no client could tell."""
    report = report_of(run, chaos, demo_model_path(), bit_stable=bit_stable)
    wanted = Counter(map(str, places))
    points = {kind: point_of(kind, run.answers, kills) for kind in sorted(wanted)}
    met_all = all(p["met"] == wanted[kind] and p["requests"] for kind, p in points.items())
    replay = report["replay"]
    replayed_all = replay["sequences"] == report["sequences"]
    report |= {
        "points": points,
        "gateways": dict(sum((Counter(kill.counted) for kill in kills), Counter())),
        "indices": indices_of(run.answers, kills),
        "whole_after_s": {kind: whole_after(kind, kills) for kind in points},
    }
    report["passed"] &= met_all and replayed_all
    return report


def point_of(kind: str, answers: Sequence[Answer], kills: Sequence[Kill]) -> dict[str, Any]:
    """Return what became of the requests of those that died at one place."""
    mine = [kill for kill in kills if str(kill.place) == kind]
    gateways = {kill.gateway for kill in mine}
    counted = sum((Counter(kill.counted) for kill in mine), Counter())
    return {
        "met": len(mine),
        "requests": sum(a.left_at(g) is not None for a in answers for g in gateways),
        "indices": indices_of(answers, mine),
        "found": [kill.met.found for kill in mine],
        "counted": dict(counted),
    }


def whole_after(kind: str, kills: Sequence[Kill]) -> dict[str, float]:
    ordered_s = sorted(kill.whole_after_s for kill in kills if str(kill.place) == kind)
    return {"p50": percentile(ordered_s, 50), "max": percentile(ordered_s, 100)}


def indices_of(answers: Sequence[Answer], kills: Sequence[Kill]) -> list[int]:
    """Return at how many tokens single sequences lost their gateway."""
    alone = [answer for answer in answers if answer.ask.num_sequences == 1]
    found = {answer.left_at(kill.gateway) for answer in alone for kill in kills}
    return sorted(index for index in found if index is not None)


def command_of(options: argparse.Namespace) -> list[str]:
    """Return the arguments of `expertmesh serve`; the loss of any expert worker parks rows."""
    return [
        "--model", "demo", "--allow-chaos",
        "--gateways", str(options.gateways), "--tensor-parallel", str(options.tensor_parallel),
        "--expert-workers", str(options.workers),
        "--set", "experts.floor=1", "--set", "experts.min=1",
        "--set", f"gateways.snapshot_tokens={options.snapshot_tokens}",
        "--set", f"gateways.standby={options.standby}",
        "--set", f"dispatch.bit_stable={str(options.bit_stable).lower()}",
    ]  # fmt: skip


def print_report(report: dict[str, Any]) -> None:
    Console(highlight=False, width=120).print(table_of(report))
    for kind, point in report["points"].items():
        counted = point["counted"]
        print(
            f"{kind}: met {point['met']} times, by {point['requests']} requests; "
            f"{counted.get('restores', 0)} restores, {counted.get('replayed_tokens', 0)} tokens "
            f"replayed, {counted.get('recomputes', 0)} recomputes of "
            f"{counted.get('recomputed_tokens', 0)} tokens; at indices {point['indices']}; "
            f"found {point['found']}"
        )
    for kind, found in report["problems"].items():
        for problem in found:
            print(f"{kind}: {problem}")
    shown = set(report) - {"points", "problems", "options"}
    print(orjson.dumps({key: report[key] for key in sorted(shown)}).decode())


def main() -> None:
    options = arguments()
    places = places_of(
        options.points, options.tensor_parallel, options.kills_per_point, options.seed
    )
    chaos = ChaosOptions(counts={}, concurrency=options.concurrency, seed=options.seed)
    command = command_of(options)
    print(f"seed {options.seed}; expertmesh serve {' '.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        trap = Trap(Path(directory))
        os.environ.update(trap.environment)
        with served(*command) as cluster:
            run, kills = run_places(cluster.endpoint, trap, places, chaos)
    report = judged(run, kills, places, chaos, bit_stable=options.bit_stable)
    report |= {"options": {k: str(v) for k, v in vars(options).items()}}
    print_report(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
