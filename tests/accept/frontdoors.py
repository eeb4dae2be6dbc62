"""Front doors, connections and gateways die under the client library; every token comes once.

    python -m tests.accept.frontdoors [--kills 75] [--cuts 125] [--doubles 50] [--json FILE]

16 requests at once go through clients of `expertmesh_client`, with an event loop and without, that
name one address or all. Front doors are killed; all connections to a front door, or those of one
client, are reset, half of the time at the client's end only (`--silences` loses what they carry
instead, and tells neither end); and a front door is killed together with the gateway that at that
moment runs a request of one of its streams, until `--doubles` of them have hit such a request: its
call broke, its tokens went on, and the gateway is not among those that finished it. Every sequence
is replayed through the experts in one process.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from cluster.chaos.faults import Done, Saboteur
from cluster.chaos.run import ChaosOptions, Run, report_of, run_script
from cluster.cli.chaos import table_of
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from tests.accept.library_load import Asked, Call, LibraryLoad
from tests.accept.owners import owners_of
from tests.cluster.harness_serve import served
from workers.clock import Clock, SystemClock

KILL, CUT, DOUBLE = "kill front door", "cut connections", "kill front door and gateway"
SILENCE = "silence connections"
PAUSE_S = (0.1, 1.5)
FRESH_S = 0.5  # since when a request must have had a token, to be in full swing
TOKENS_LEFT = 24  # that it must still lack, so that it does not end before the kill
LOOK_S = 0.05
SEARCH_S = 20.0
MOST_TRIES = 3  # for each double fault that is to hit a request


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=75, help="of a front door")
    parser.add_argument("--cuts", type=int, default=125, help="of connections")
    parser.add_argument("--doubles", type=int, default=50, help="a front door with its gateway")
    parser.add_argument("--silences", type=int, default=0, help="of connections, told to nobody")
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--front-doors", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--bit-stable", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


@dataclass(frozen=True)
class Victim:
    """A request whose front door and gateway were killed at once while it ran."""

    asked: Asked
    call: Call
    gateway: str
    killed_s: float
    num_tokens: int

    @property
    def was_hit(self) -> bool:
        """Whether its call broke by it, as is known soon."""
        return self.call.ended_s is not None and self.call is not self.asked.calls[-1]

    @property
    def went_on(self) -> bool:
        """Whether the rest came from elsewhere, as is known at the end."""
        answer = self.asked.answer
        num_tokens = sum(len(answer.token_ids(s)) for s in answer.arrivals)
        return num_tokens > self.num_tokens and self.gateway not in dict(answer.legs)


@dataclass(frozen=True)
class Double:
    """A front door and a gateway that were killed at once, and whose requests they were."""

    front_door: str
    gateway: str
    victims: list[Victim]

    @property
    def has_hit(self) -> bool:
        """Whether a request lost both."""
        return any(victim.was_hit for victim in self.victims)


class Havoc:
    """Does the faults, each once the cluster is whole after the one before."""

    def __init__(self, saboteur: Saboteur, load: LibraryLoad, *, seed: int, clock: Clock) -> None:
        self._saboteur = saboteur
        self._load = load
        self._clock = clock
        self._draw = random.Random(f"{seed}/havoc")
        self._struck_s = clock.now_s()
        self.doubles: list[Double] = []

    async def run(self, counts: Mapping[str, int]) -> None:
        """Do all of them in a random order, and doubles until so many have hit a request."""
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        doubles = counts[DOUBLE]
        self._draw.shuffle(kinds)
        for kind in kinds:
            await self._strike(kind)
        while self.num_hits < doubles and len(self.doubles) < MOST_TRIES * doubles:
            await self._strike(DOUBLE)

    @property
    def num_hits(self) -> int:
        """How many doubles have hit a request."""
        return sum(double.has_hit for double in self.doubles)

    async def _strike(self, kind: str) -> None:
        await asyncio.sleep(self._draw.uniform(*PAUSE_S))
        status = await self._saboteur.whole()
        if kind == KILL:
            await self._kill(self._draw.choice(serving(status, pb.ROLE_FRONT_DOOR)))
        elif kind == DOUBLE:
            await self._kill_with_gateway()
        else:
            await self._cut(kind)
        self._struck_s = self._clock.now_s()

    async def _cut(self, kind: str) -> None:
        """Cut or silence all connections to one front door, or those of one client only."""
        ends = [
            (c, cable, e) for c in self._load.callers for cable in c.cables for e in cable.endpoints
        ]
        if not ends:
            return
        caller, _, endpoint = self._draw.choice(ends)
        if self._draw.random() < 0.5:
            whose, ends = f"of {caller.name}", [end for end in ends if end[0] is caller]
        else:
            whose, ends = f"to {endpoint}", [end for end in ends if end[2] == endpoint]
        one_end = kind == CUT and self._draw.random() < 0.5
        name = kind + (", one end" if one_end else "")
        async with self._saboteur.fault(name, (f"{len(ends)} {whose}",)):
            for _, cable, to in ends:
                if kind == SILENCE:
                    cable.silence(to=to)
                else:
                    cable.cut(one_end=one_end, to=to)

    async def _kill(self, *members: pb.Member, kind: str = KILL) -> None:
        names = tuple(map(name_of, members))
        async with self._saboteur.fault(kind, names, without=names):
            for member in members:
                os.kill(self._draw.choice(list(member.pids) or [member.pid]), signal.SIGKILL)
                self._saboteur.must_end(list(member.pids) or [member.pid])

    async def _kill_with_gateway(self) -> None:
        """Kill a front door and the gateway that runs requests of its streams, if there is one."""
        end_s = self._clock.now_s() + SEARCH_S
        while True:
            status = await self._saboteur.whole()
            door = self._draw.choice(serving(status, pb.ROLE_FRONT_DOOR))
            gateways = {name_of(m): m for m in serving(status, pb.ROLE_GATEWAY)}
            asked = {a.request_id: a for a in self._load.running() if self._is_in_swing(a, door)}
            owners = await owners_of(asked, list(gateways.values()))
            owned = sorted(set(owners.values()) & gateways.keys())
            if owned or self._clock.now_s() >= end_s:
                break
            await asyncio.sleep(LOOK_S)
        gateway = gateways[self._draw.choice(owned or sorted(gateways))]
        theirs = [asked[i] for i, owner in owners.items() if owner == name_of(gateway)]
        victims = [self._victim(a, name_of(gateway)) for a in theirs if a.door == door.endpoint]
        self.doubles.append(Double(name_of(door), name_of(gateway), victims))
        await self._kill(door, gateway, kind=DOUBLE)

    def _is_in_swing(self, asked: Asked, door: pb.Member) -> bool:
        """Whether a stream of the front door brings tokens, and will for a while."""
        times_s = [t for s in asked.answer.arrivals for t in asked.answer.times_s(s)]
        is_fresh = bool(times_s) and max(times_s) > self._clock.now_s() - FRESH_S
        has_seen_the_last_fault = sum(t > self._struck_s for t in times_s) >= 2
        ask = asked.answer.ask
        left = min(
            ask.max_tokens - len(asked.answer.token_ids(s)) for s in range(ask.num_sequences)
        )
        is_there = asked.door == door.endpoint
        return is_there and is_fresh and has_seen_the_last_fault and left >= TOKENS_LEFT

    def _victim(self, asked: Asked, gateway: str) -> Victim:
        num_tokens = sum(len(asked.answer.token_ids(s)) for s in asked.answer.arrivals)
        return Victim(asked, asked.calls[-1], gateway, self._clock.now_s(), num_tokens)


def serving(status: pb.ClusterStatus, role: pb.Role.ValueType) -> list[pb.Member]:
    members = status.view.members
    return [m for m in members if m.role == role and m.state == pb.MEMBER_STATE_ACTIVE]


def name_of(member: pb.Member) -> str:
    return f"{member.name}.{member.incarnation}"


@dataclass(frozen=True)
class Havocked:
    """What clients saw, and what became of the double faults."""

    run: Run
    asked: list[Asked]
    doubles: list[Double]


async def harm(endpoint: str, options: argparse.Namespace) -> Havocked:
    """Run the load and the faults."""
    clock = SystemClock()
    loads: list[LibraryLoad] = []
    doubles: list[Double] = []

    def make_load(doors: Any, vocabulary_size: int) -> LibraryLoad:
        loads.append(
            LibraryLoad(
                doors,
                vocabulary_size,
                num_doors=options.front_doors,
                concurrency=options.concurrency,
                seed=options.seed,
                clock=clock,
            )
        )
        return loads[0]

    async def script(saboteur: Saboteur) -> None:
        havoc = Havoc(saboteur, loads[0], seed=options.seed, clock=clock)
        await havoc.run(
            {
                KILL: options.kills,
                CUT: options.cuts,
                SILENCE: options.silences,
                DOUBLE: options.doubles,
            }
        )
        doubles.extend(havoc.doubles)

    def progress(done: Done) -> None:
        names = " ".join(done.members)
        print(f"{done.window.kind} {names}: whole after {done.whole_after_s:.1f} s", flush=True)

    run = await run_script(
        endpoint, chaos_of(options), script, clock=clock, progress=progress, make_load=make_load
    )
    return Havocked(run, loads[0].all, doubles)


def chaos_of(options: argparse.Namespace) -> ChaosOptions:
    return ChaosOptions(
        counts={}, concurrency=options.concurrency, seed=options.seed, breaks_streams=True
    )


def command_of(options: argparse.Namespace) -> list[str]:
    """Return the arguments of `expertmesh serve`."""
    standby = ["--set", "experts.standby=1"] if options.workers else []
    return [
        "--model", "demo", "--allow-chaos",
        "--gateways", str(options.gateways), "--tensor-parallel", str(options.tensor_parallel),
        "--expert-workers", str(options.workers), *standby,
        "--set", f"front_doors.count={options.front_doors}",
        "--set", f"dispatch.bit_stable={str(options.bit_stable).lower()}",
    ]  # fmt: skip


def judged(havocked: Havocked, options: argparse.Namespace) -> dict[str, Any]:
    """Judge a run: `passed` says whether all came once, and enough doubles hit a request."""
    report = report_of(
        havocked.run, chaos_of(options), demo_model_path(), bit_stable=options.bit_stable
    )
    hits = [double for double in havocked.doubles if double.has_hit]
    victims = [victim for double in hits for victim in double.victims if victim.was_hit]
    told = [victim for victim in victims if victim.asked.answer.legs]  # with the last call's end
    stayed = [v.asked.request_id for v in told if not v.went_on]
    report["doubles"] = {
        "done": len(havocked.doubles),
        "hit": len(hits),
        "requests_hit": len(victims),
        "requests_hit_whose_route_was_told": len(told),
        "requests_hit_that_did_not_go_on_elsewhere": stayed,
    }
    report["clients"] = Counter(asked.caller.name for asked in havocked.asked)
    report["windows_s"] = Counter(str(a.answer.ask.resume_window_s) for a in havocked.asked)
    report["calls"] = sum(len(asked.calls) for asked in havocked.asked)
    report["most_calls_of_a_request"] = max((len(a.calls) for a in havocked.asked), default=0)
    report["breaks"] = Counter(
        broken.partition(":")[0] for a in havocked.run.answers for broken in a.breaks
    )
    report["options"] = {k: str(v) for k, v in vars(options).items()}
    report["passed"] = report["passed"] and len(hits) >= options.doubles and not stayed
    return report


def main() -> None:
    options = arguments()
    command = command_of(options)
    print(f"seed {options.seed}; expertmesh serve {' '.join(command)}", flush=True)
    with served(*command) as cluster:
        havocked = asyncio.run(harm(cluster.endpoint, options))
    report = judged(havocked, options)
    Console(highlight=False, width=120).print(table_of(report))
    shown = ("faults", "doubles", "clients", "windows_s", "calls", "breaks")
    print(orjson.dumps({key: report[key] for key in shown}).decode())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    for kind, found in report["problems"].items():
        for problem in found:
            print(f"{kind}: {problem}")
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
