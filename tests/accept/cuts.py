"""A host with expert workers is cut off under load, and comes back; requests must not notice.

    python -m tests.accept.cuts [--short 5] [--long 3] [--floor 2] [--json FILE]

Two network namespaces are the hosts; needs root. The first runs Ray's head, the gateway, the front
door and half of the expert workers, the second the other half. A cut of 3 s heals by itself: the
same processes go on. After a long one those workers come back as new incarnations.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson
from rich.console import Console

from cluster.chaos.faults import Done, Saboteur
from cluster.chaos.run import ChaosOptions, report_of, run_script
from cluster.cli.chaos import table_of
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from tests.cluster.harness_head import ray_head
from tests.cluster.harness_hosts import Host, are_possible, hosts, in_namespaces_of_its_own
from tests.cluster.harness_serve import served
from workers.clock import SystemClock

WORKERS_A_HOST = 2
SHORT_S = 3.0
LONG_S = 25.0  # beyond control.lost_s
SETTLE_S = 5.0


class ChangedError(AssertionError):
    """The wrong workers changed, or none did."""


async def workers(saboteur: Saboteur) -> tuple[set[str], set[str]]:
    """Return NAME.INCARNATION of the serving workers beside the gateway, and of those elsewhere."""
    members = (await saboteur.whole()).view.members
    (near,) = {m.node for m in members if m.role == pb.ROLE_GATEWAY}
    serving = [
        m for m in members if m.role == pb.ROLE_EXPERT_WORKER and m.state == pb.MEMBER_STATE_ACTIVE
    ]
    beside = {f"{m.name}.{m.incarnation}" for m in serving if m.node == near}
    return beside, {f"{m.name}.{m.incarnation}" for m in serving} - beside


async def cut(saboteur: Saboteur, host: Host, length_s: float) -> None:
    """Cut the far host off; its workers must be the same after a short cut, new after a long."""
    beside, away = await workers(saboteur)
    if not beside or not away:
        raise ChangedError(f"not spread over both hosts: {len(beside)} here, {len(away)} there")
    async with saboteur.fault(f"cut {length_s:g} s", (host.address,)):
        host.cut()
        await asyncio.sleep(length_s)
        status = await saboteur.status()
        host.mend()
        if status is None:
            raise ChangedError("the controller does not answer: it was cut off, too")
        silent_s = {m.name: round(m.silent_s, 1) for m in status.members if m.suspect}
        print(f"  silent for: {silent_s}; {'; '.join(status.reasons)}", flush=True)
    still_beside, still_away = await workers(saboteur)
    after = still_beside | still_away
    print(f"  {sorted(beside)} and {sorted(away)} are {sorted(still_beside)} and "
          f"{sorted(still_away)}", flush=True)  # fmt: skip
    if beside - after:
        raise ChangedError(f"workers that were not cut off are gone: {sorted(beside - after)}")
    if length_s < LONG_S and away - after:
        raise ChangedError(f"gone after a cut of {length_s:g} s: {sorted(away - after)}")
    if length_s >= LONG_S and away & after:
        raise ChangedError(f"still there after {length_s:g} s: {sorted(away & after)}")
    await asyncio.sleep(SETTLE_S)


def run_inside(options: argparse.Namespace) -> bool:
    """Make the hosts, run, report; returns whether no client could tell."""
    chaos = ChaosOptions(counts={}, seed=options.seed, concurrency=options.concurrency)
    lengths_s = [SHORT_S] * options.short + [LONG_S] * options.long

    def progress(done: Done) -> None:
        print(
            f"{done.window.kind}: whole {done.whole_after_s:.1f} s after it was mended", flush=True
        )

    with (
        tempfile.TemporaryDirectory(prefix="journal-") as journal,
        hosts(2) as (near, far),
        ray_head(
            "rocksdb", host=near.address, inside=near.inside,
            resources={"gateway": 4, "frontdoor": 4, "expert_slot": WORKERS_A_HOST},
        ) as head,
    ):  # fmt: skip
        head.join(far.address, {"expert_slot": WORKERS_A_HOST}, far.inside)
        command = [
            "--ray-address", head.address, "--model", "demo", "--allow-chaos", "--insecure",
            "--expert-workers", str(2 * WORKERS_A_HOST), "--set", "experts.min=1",
            "--set", f"experts.floor={options.floor}", "--set", f"control.journal={journal}",
            "--set", "experts.resources={expert_slot: 1}",
            "--set", "gateways.resources={gateway: 1}",
            "--set", "front_doors.resources={frontdoor: 1}",
        ]  # fmt: skip
        print(f"seed {options.seed}; expertmesh serve {' '.join(command)}", flush=True)
        with served(*command, host=near.address, inside=near.inside) as cluster:

            async def script(saboteur: Saboteur) -> None:
                for length_s in lengths_s:
                    await cut(saboteur, far, length_s)

            run = asyncio.run(
                run_script(cluster.endpoint, chaos, script, clock=SystemClock(), progress=progress)
            )
    report = report_of(run, chaos, demo_model_path())
    Console(highlight=False, width=120).print(table_of(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    for kind, found in report["problems"].items():
        for problem in found:
            print(f"{kind}: {problem}")
    return bool(report["passed"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", type=int, default=5)
    parser.add_argument("--long", type=int, default=3)
    parser.add_argument("--floor", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help="the namespaces are there already")
    options = parser.parse_args()
    if options.inside:
        sys.exit(0 if run_inside(options) else 1)
    if not are_possible():
        sys.exit("network namespaces need root, and unshare, ip and mount")
    command = in_namespaces_of_its_own("tests.accept.cuts", *sys.argv[1:], "--inside")
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
