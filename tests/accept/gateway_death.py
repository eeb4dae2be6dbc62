"""Gateways are killed under load, or at chosen tokens of one stream; no client may be able to tell.

    python -m tests.accept.gateway_death load [--kills 100] [--drains 20] [--json FILE]
    python -m tests.accept.gateway_death indices [--every 10] [--json FILE]

`load` kills one rank of a random gateway, and drains gateways, under 16 concurrent requests, and
replays every sequence through the experts in one process. `indices` kills the gateway of a stream
of 200 tokens when its client has the n-th, for every n-th, and compares with the undisturbed
stream; it runs in bit-stable mode, where the tokens must be the same.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import orjson
from rich.console import Console

from cluster.chaos.doors import Doors
from cluster.chaos.faults import Done, Saboteur
from cluster.chaos.run import ChaosOptions, report_of, run_script
from cluster.chaos.stalls import percentile
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
POLL_S = 0.5


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
    parser.add_argument("--bit-stable", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Census:
    """Adds up the counters of all gateways that ever were, also of those that have died since."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, int]] = {}

    def note(self, status: pb.ClusterStatus | None) -> None:
        for member in status.members if status else ():
            if member.HasField("gateway_stats"):
                stats = {name: getattr(member.gateway_stats, name) for name in COUNTED}
                self._of[f"{member.name}.{member.incarnation}"] = stats

    async def follow(self, saboteur: Saboteur) -> None:
        while True:
            self.note(await saboteur.status())
            await asyncio.sleep(POLL_S)

    def total(self) -> dict[str, int]:
        return dict(sum((Counter(stats) for stats in self._of.values()), Counter()))


def serving(status: pb.ClusterStatus) -> list[pb.Member]:
    members = status.view.members
    return [m for m in members if m.role == pb.ROLE_GATEWAY and m.state == pb.MEMBER_STATE_ACTIVE]


def pids_of(member: pb.Member) -> list[int]:
    """Return the processes of a gateway, one for each rank where the View tells them."""
    return list(getattr(member, "pids", ())) or [member.pid]


async def harm(saboteur: Saboteur, options: argparse.Namespace, stub: Any, census: Census) -> None:
    """Kill and drain gateways in a random order."""
    draw = random.Random(options.seed)
    kinds = ["kill gateway"] * options.kills + ["drain gateway"] * options.drains
    draw.shuffle(kinds)
    following = asyncio.create_task(census.follow(saboteur))
    for kind in kinds:
        await asyncio.sleep(draw.uniform(0.5, 3.0))
        victim = draw.choice(serving(await saboteur.whole()))
        name = f"{victim.name}.{victim.incarnation}"
        async with saboteur.fault(kind, (name,)):
            if kind == "kill gateway":
                os.kill(draw.choice(pids_of(victim)), signal.SIGKILL)
                await saboteur.whole(without=(name,))
            else:
                await stub.Scale(
                    pb.ScaleRequest(role=pb.ROLE_GATEWAY, count=options.gateways + 1), timeout=15
                )
                await saboteur.whole()
                await stub.Drain(pb.DrainRequest(member=name), timeout=15)
                await saboteur.whole(without=(name,))
    following.cancel()
    census.note(await saboteur.status())


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
    return report | {"gateways": census.total()}


async def stream(stub: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """Yield the messages with tokens of the one stream, greedy."""
    request = inference_pb2.GenerateRequest(
        text="In the beginning",
        sampling=inference_pb2.Sampling(temperature=0),
        stopping=inference_pb2.Stopping(max_tokens=TOKENS, ignore_eos=True),
    )
    async for response in stub.Generate(request, timeout=120):
        if response.token_ids:
            yield response


async def one_kill(
    stub: Any, saboteur: Saboteur, at: int, expected: list[int], draw: random.Random
) -> dict[str, Any]:
    """Kill the gateway of a stream when its client has `at` tokens."""
    members = serving(await saboteur.whole())
    received: list[int] = []
    killed = problem = ""
    stall_s, last_s = 0.0, 0.0
    async for response in stream(stub):
        now_s = time.perf_counter()
        stall_s, last_s = max(stall_s, now_s - last_s if killed else 0.0), now_s
        if response.first_token_index != len(received):
            problem = f"token {response.first_token_index} where {len(received)} was due"
        received += response.token_ids
        if len(received) >= at and not killed:
            victim = await running_at(members)
            if victim is None:
                break  # it was done before its client had read so far
            killed = f"{victim.name}.{victim.incarnation}"
            os.kill(draw.choice(pids_of(victim)), signal.SIGKILL)
            last_s = time.perf_counter()
    if killed:
        if received != expected:
            problem = problem or "other tokens than undisturbed"
        await saboteur.whole(without=(killed,))
    return {"at": at, "killed": killed, "stall_s": stall_s, "problem": problem}


async def running_at(members: list[pb.Member]) -> pb.Member | None:
    """Return the gateway that has the stream, by its own word on its metrics page."""
    for member in members:
        reader, writer = await asyncio.open_connection(*member.metrics.split(":"))
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = (await reader.read()).decode()
        writer.close()
        if any(
            line.startswith("expertmesh_gateway_running_sequences{") and not line.endswith(" 0.0")
            for line in page.splitlines()
        ):
            return member
    return None


async def kill_at_indices(options: argparse.Namespace, endpoint: str) -> dict[str, Any]:
    draw = random.Random(options.seed)
    doors = Doors(endpoint, seed=options.seed)
    async with grpc.aio.insecure_channel(endpoint) as channel, doors.open():
        stub = InferenceServiceStub(channel)
        saboteur = Saboteur(doors, seed=options.seed, clock=SystemClock())
        census = Census()
        expected = [t async for r in stream(stub) for t in r.token_ids]
        following = asyncio.create_task(census.follow(saboteur))
        kills = []
        for at in range(1, TOKENS, options.every):
            kills.append(await one_kill(stub, saboteur, at, expected, draw))
            print(kills[-1], flush=True)
        await asyncio.sleep(2 * POLL_S)
        following.cancel()
    done = [k for k in kills if k["killed"]]
    stalls_s = sorted(k["stall_s"] for k in done)
    return {
        "kills": kills,
        "num_kills": len(done),
        "too_late": len(kills) - len(done),
        "stall_ms": {f"p{p}": 1000 * percentile(stalls_s, p) for p in (50, 90, 99, 100)},
        "gateways": census.total(),
        "passed": bool(done) and not any(k["problem"] for k in kills),
    }


def main() -> None:
    options = arguments()
    bit_stable = options.bit_stable or options.what == "indices"
    command = [
        "--model", "demo", "--allow-chaos",
        "--gateways", str(options.gateways), "--tensor-parallel", str(options.tensor_parallel),
        "--expert-workers", str(options.workers),
        "--set", f"gateways.snapshot_tokens={options.snapshot_tokens}",
        "--set", f"gateways.standby={options.standby}",
        "--set", f"dispatch.bit_stable={str(bit_stable).lower()}",
    ]  # fmt: skip
    print(f"seed {options.seed}; expertmesh serve {' '.join(command)}", flush=True)
    with served(*command) as cluster:
        if options.what == "load":
            report = run_load(options, cluster.endpoint)
        else:
            report = asyncio.run(kill_at_indices(options, cluster.endpoint))
    report |= {"options": {k: str(v) for k, v in vars(options).items()}}
    if options.what == "load":
        Console(highlight=False, width=120).print(table_of(report))
        for kind, found in report["problems"].items():
            for problem in found:
                print(f"{kind}: {problem}")
    print(orjson.dumps({k: report[k] for k in ("gateways", "passed")}).decode())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
