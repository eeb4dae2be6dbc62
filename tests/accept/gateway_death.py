"""Gateways are killed under load, or at chosen tokens of one stream; no client may be able to tell.

    python -m tests.accept.gateway_death load [--kills 100] [--drains 20] [--json FILE]
    python -m tests.accept.gateway_death indices [--every 10] [--json FILE]

`load` kills one rank of a random gateway, and drains gateways, under 16 concurrent requests, and
replays every sequence through the experts in one process. Without kills, what the drains cost is
known: no sequence may be computed from its prompt again, nor more of it than lies between two
snapshots. `indices` kills gateways until for every
n-th token there was a stream of 200 whose gateway died when its client had that many; up to 16
streams, each behind the one before it, meet one kill. They are replayed as well.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import grpc
import orjson
from rich.console import Console

from cluster.chaos.doors import Doors
from cluster.chaos.faults import Done, Saboteur
from cluster.chaos.history import Answer, Ask, problems_of
from cluster.chaos.load import draw_ask, legs_of, message_of, note
from cluster.chaos.run import ChaosOptions, Run, report_of, run_script
from cluster.chaos.stalls import percentile
from cluster.chaos.verdict import replays
from cluster.cli.chaos import table_of
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from cluster.pb.expertmesh.v1 import inference_pb2
from cluster.pb.expertmesh.v1.cluster_pb2_grpc import ClusterServiceStub
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from tests.cluster.harness_serve import served
from workers.clock import SystemClock

COUNTED = (
    "snapshots_stored", "snapshots_skipped", "restores", "recomputes",
    "replayed_tokens", "recomputed_tokens", "moved",
)  # fmt: skip
TOKENS = 200
KILL = "kill gateway"
COHORT = 16
FIRST_TOKENS = 3  # that the leader gets before a new stream has its first one
REACH_TOKENS = 8  # before and after the furthest target, among which the best moment is chosen
MOST_KILLS = 250
POLL_S = 0.5
METRICS_S = 10.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["load", "indices"])
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--standby", type=int, default=0, help="warm gateways beside them")
    parser.add_argument("--snapshot-tokens", type=int, default=64)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--drains", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="kill at every n-th token index")
    parser.add_argument("--after", type=Path, help="a report of load: its indices are left out")
    parser.add_argument("--bit-stable", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Census:
    """Adds up the counters of all gateways that ever were, also of those that have died since."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, int]] = {}
        self.by_drain: list[dict[str, int]] = []
        self._before: Counter[str] | None = None  # the drain that is counted now

    def note(self, status: pb.ClusterStatus | None) -> None:
        for member in status.members if status else ():
            if member.HasField("gateway_stats"):
                stats = {name: getattr(member.gateway_stats, name) for name in COUNTED}
                self._of[f"{member.name}.{member.incarnation}"] = stats

    async def follow(self, saboteur: Saboteur) -> None:
        while True:
            self.note(await saboteur.status())
            await asyncio.sleep(POLL_S)

    def total(self) -> Counter[str]:
        return sum((Counter(stats) for stats in self._of.values()), Counter())

    def drains(self) -> None:
        """Begin to count for a drain; what was counted until then was of the one before."""
        now, before = self.total(), self._before
        if before is not None:
            self.by_drain.append({name: now[name] - before[name] for name in COUNTED})
        self._before = now

    def dear_drains(self, snapshot_tokens: int) -> list[int]:
        """Return the numbers of drains for which more was computed again than may be."""
        return [
            number
            for number, cost in enumerate(self.by_drain)
            if cost["recomputes"] or cost["replayed_tokens"] > snapshot_tokens * cost["restores"]
        ]


def serving(status: pb.ClusterStatus) -> list[pb.Member]:
    members = status.view.members
    return [m for m in members if m.role == pb.ROLE_GATEWAY and m.state == pb.MEMBER_STATE_ACTIVE]


def pids_of(member: pb.Member) -> list[int]:
    """Return the processes of a gateway, one for each rank where the View tells them."""
    return list(member.pids) or [member.pid]


async def harm(saboteur: Saboteur, options: argparse.Namespace, stub: Any, census: Census) -> None:
    """Kill and drain gateways in a random order."""
    draw = random.Random(options.seed)
    kinds = [KILL] * options.kills + ["drain gateway"] * options.drains
    draw.shuffle(kinds)
    following = asyncio.create_task(census.follow(saboteur))
    for kind in kinds:
        await asyncio.sleep(draw.uniform(0.5, 3.0))
        victim = draw.choice(serving(await saboteur.whole()))
        name = f"{victim.name}.{victim.incarnation}"
        async with saboteur.fault(kind, (name,)):
            if kind == KILL:
                saboteur.must_end(pids_of(victim))
                os.kill(draw.choice(pids_of(victim)), signal.SIGKILL)
                await saboteur.whole(without=(name,))
            else:
                await stub.Scale(
                    pb.ScaleRequest(role=pb.ROLE_GATEWAY, count=options.gateways + 1), timeout=15
                )
                census.note(await saboteur.whole())
                census.drains()
                await stub.Drain(pb.DrainRequest(member=name), timeout=15)
                saboteur.must_end(pids_of(victim))
                await saboteur.whole(without=(name,))
    following.cancel()
    await asyncio.sleep(METRICS_S)  # until the last counters are told
    census.note(await saboteur.status())
    census.drains()


def run_load(options: argparse.Namespace, endpoint: str) -> dict[str, Any]:
    chaos = ChaosOptions(counts={}, seed=options.seed)
    census = Census()

    def progress(done: Done) -> None:
        print(
            f"{done.window.kind} {' '.join(done.members)}: {done.whole_after_s:.1f} s", flush=True
        )

    async def script(saboteur: Saboteur) -> None:
        async with grpc.aio.insecure_channel(endpoint) as channel:
            await harm(saboteur, options, ClusterServiceStub(channel), census)

    run = asyncio.run(run_script(endpoint, chaos, script, clock=SystemClock(), progress=progress))
    report = report_of(run, chaos, demo_model_path(), bit_stable=options.bit_stable)
    report |= {"gateways": dict(census.total()), "indices": indices_of(run)}
    if not options.kills:
        dear = census.dear_drains(options.snapshot_tokens)
        moved = sum(cost["restores"] for cost in census.by_drain)
        is_dear = bool(dear or census.total()["recomputes"])
        report |= {"drains": census.by_drain, "dear_drains": dear}
        report["passed"] = report["passed"] and moved > 0 and not is_dear
    return report


def indices_of(run: Run) -> list[int]:
    """Return at how many tokens of 200 sequences lost their gateway by a kill."""
    kills = [(d.window.start_s, d.members[0]) for d in run.done if d.window.kind == KILL]
    found = set()
    for answer in run.answers:
        for killed_s, victim in kills:
            at = answer.num_tokens_at(killed_s)
            is_alone = answer.ask.num_sequences == 1 and answer.ask.max_tokens == TOKENS
            if is_alone and has_left(answer, victim, at):
                found.add(at)
    return sorted(found)


def has_left(answer: Answer, gateway: str, num_tokens: int) -> bool:
    """Whether a request left a gateway with that many tokens or more."""
    left_at = answer.left_at(gateway)
    return left_at is not None and left_at >= num_tokens


class Stream:
    """One stream of a cohort: a request of the load, but with one sequence of 200 tokens."""

    def __init__(self, ask: Ask) -> None:
        self.answer = Answer(replace(ask, max_tokens=TOKENS, num_sequences=1), time.perf_counter())
        self.has_ended = False
        self.at = 0  # how many tokens it had when a gateway was killed
        self._killed_s = 0.0

    async def follow(self, stub: Any, request_id: str, progress: asyncio.Event) -> None:
        """Read all of it; `progress` is set with every message, and at the end."""
        call = stub.Generate(message_of(self.answer, request_id), timeout=300)
        try:
            async for response in call:
                note(self.answer, response, time.perf_counter())
                progress.set()
            self.answer.legs = legs_of(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            self.answer.error = f"{error.code().name}: {error.details()}"
        finally:
            self.has_ended = True
            progress.set()

    @property
    def num_tokens(self) -> int:
        return len(self.answer.token_ids(0))

    def killed(self) -> None:
        """Note that a gateway is killed just now."""
        self.at, self._killed_s = self.num_tokens, time.perf_counter()

    @property
    def stall_s(self) -> float:
        """The longest gap after the kill."""
        times_s = [self._killed_s, *(t for t in self.answer.times_s(0) if t > self._killed_s)]
        return max((after - before for before, after in pairwise(times_s)), default=0.0)


class Cohort:
    """Streams that are about chosen tokens at one moment, each behind the one before it.

    Args:
        stub: The front door.
        missing: At how many tokens streams are still to lose their gateway.
    """

    def __init__(self, stub: Any, missing: set[int], asks: Iterator[Ask]) -> None:
        self._stub = stub
        self._missing = missing
        every = max(1, len(missing) // COHORT)
        self._targets = targets = sorted(missing, reverse=True)[::every][:COHORT]
        self._progress = asyncio.Event()
        self.streams = [Stream(next(asks)) for _ in targets]

    async def run(self, choose: Callable[[], Awaitable[int | None]]) -> None:
        """Run all of them; the process that `choose` returns is killed when they are there."""
        leader, furthest = self.streams[0], self._targets[0]
        async with asyncio.TaskGroup() as group:
            for stream, target in zip(self.streams, self._targets, strict=True):
                await self._until(leader, furthest - target - FIRST_TOKENS)
                request_id = f"indices-{stream.answer.ask.number}"
                group.create_task(stream.follow(self._stub, request_id, self._progress))
            await self._until(leader, furthest - REACH_TOKENS)
            process = await choose()
            await self._until(leader, leader.num_tokens + self._best_wait())
            for stream in self.streams:
                stream.killed()
            if process is not None:
                os.kill(process, signal.SIGKILL)

    def _best_wait(self) -> int:
        """Return in how many tokens most of the streams are where one is missing."""
        now = [stream.num_tokens for stream in self.streams]
        room = TOKENS - 1 - now[0]
        return max(range(max(1, min(2 * REACH_TOKENS, room + 1))), key=lambda n: self._hits(now, n))

    def _hits(self, now: list[int], num_tokens: int) -> int:
        return sum(at + num_tokens in self._missing for at in now)

    async def _until(self, leader: Stream, num_tokens: int) -> None:
        while leader.num_tokens < num_tokens and not leader.has_ended:
            self._progress.clear()
            await self._progress.wait()


@dataclass(frozen=True)
class Kill:
    """A gateway that was killed, its streams, and all streams of that cohort."""

    gateway: str
    hit: list[Stream]
    streams: list[Stream]


async def one_kill(
    stub: Any, saboteur: Saboteur, missing: set[int], asks: Iterator[Ask], draw: random.Random
) -> Kill:
    """Kill a gateway when its streams are at tokens at which none has been killed yet."""
    members = serving(await saboteur.whole())
    cohort = Cohort(stub, missing, asks)
    victims: list[pb.Member] = []

    async def choose() -> int | None:
        busy = [m for m in members if await is_busy(m)]
        if not busy:  # all have ended meanwhile
            return None
        victims.append(draw.choice(busy))
        saboteur.must_end(pids_of(victims[0]))
        return draw.choice(pids_of(victims[0]))

    await cohort.run(choose)
    if not victims:
        return Kill("", [], cohort.streams)
    victim = f"{victims[0].name}.{victims[0].incarnation}"
    await saboteur.whole(without=(victim,))
    hit = [s for s in cohort.streams if has_left(s.answer, victim, s.at)]
    return Kill(victim, hit, cohort.streams)


async def is_busy(member: pb.Member) -> bool:
    """Whether a gateway has a sequence, by its own word on its metrics page."""
    async with asyncio.timeout(METRICS_S):
        reader, writer = await asyncio.open_connection(*member.metrics.split(":"))
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = (await reader.read()).decode()
        writer.close()
    return any(
        line.startswith("expertmesh_gateway_running_sequences{") and not line.endswith(" 0.0")
        for line in page.splitlines()
    )


def wanted_indices(options: argparse.Namespace) -> set[int]:
    """Return at how many tokens a stream is to lose its gateway."""
    before = orjson.loads(options.after.read_bytes())["indices"] if options.after else ()
    return set(range(0, TOKENS, options.every)).difference(before)


async def kill_at_indices(options: argparse.Namespace, endpoint: str) -> list[Kill]:
    """Kill until there was a stream at every token; returns what was done."""
    draw = random.Random(options.seed)
    doors = Doors(endpoint, seed=options.seed)
    kills: list[Kill] = []
    missing = wanted_indices(options)
    async with grpc.aio.insecure_channel(endpoint) as channel, doors.open():
        stub = InferenceServiceStub(channel)
        (model,) = (await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)).models
        asks = (draw_ask(options.seed, number, model.vocabulary_size) for number in count())
        saboteur = Saboteur(doors, seed=options.seed, clock=SystemClock())
        while missing and len(kills) < MOST_KILLS:
            kills.append(await one_kill(stub, saboteur, missing, asks, draw))
            hit = {stream.at: round(stream.stall_s, 3) for stream in kills[-1].hit}
            missing -= set(hit)
            print(f"{kills[-1].gateway}, stalls in s: {hit}; {len(missing)} left", flush=True)
    return kills


def report_of_indices(kills: list[Kill], options: argparse.Namespace) -> dict[str, Any]:
    """Judge the streams: every token once and right, and one at every index at a kill."""
    answers = [stream.answer for kill in kills for stream in kill.streams]
    problems = problems_of(answers)
    verdicts = list(replays(demo_model_path(), answers, bit_stable=options.bit_stable))
    hit = [stream for kill in kills for stream in kill.hit]
    missing = wanted_indices(options) - {stream.at for stream in hit}
    stalls_s = sorted(stream.stall_s for stream in hit)
    wrong = sum(not verdict.is_right for verdict in verdicts)
    return {
        "kills": [(kill.gateway, sorted(stream.at for stream in kill.hit)) for kill in kills],
        "num_kills": len(kills),
        "streams": len(answers),
        "streams_hit": len(hit),
        "indices_missing": sorted(missing),
        "problems": asdict(problems),
        "replayed": len(verdicts),
        "wrong": wrong,
        "explained": sum(m.is_explained for verdict in verdicts for m in verdict.mismatches),
        "stall_ms": {f"p{p}": 1000 * percentile(stalls_s, p) for p in (50, 90, 99, 100)},
        "passed": not (missing or wrong or problems.count) and bool(verdicts),
    }


def main() -> None:
    options = arguments()
    command = [
        "--model", "demo", "--allow-chaos",
        "--gateways", str(options.gateways), "--tensor-parallel", str(options.tensor_parallel),
        "--expert-workers", str(options.workers),
        "--set", f"gateways.snapshot_tokens={options.snapshot_tokens}",
        "--set", f"gateways.standby={options.standby}",
        "--set", f"dispatch.bit_stable={str(options.bit_stable).lower()}",
    ]  # fmt: skip
    print(f"seed {options.seed}; expertmesh serve {' '.join(command)}", flush=True)
    with served(*command) as cluster:
        if options.what == "load":
            report = run_load(options, cluster.endpoint)
        else:
            kills = asyncio.run(kill_at_indices(options, cluster.endpoint))
            report = report_of_indices(kills, options)
    report |= {"options": {k: str(v) for k, v in vars(options).items()}}
    if options.what == "load":
        Console(highlight=False, width=120).print(table_of(report))
    for kind, found in report["problems"].items():
        for problem in found:
            print(f"{kind}: {problem}")
    shown = set(report) - {"kills", "problems", "options"}
    print(orjson.dumps({key: report[key] for key in sorted(shown)}).decode())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
