"""Ray's head service (GCS) is killed again and again under load; requests must not notice.

    python -m tests.accept.head_death [--kills 10] [--storage rocksdb | redis] [--json FILE]

Its tables are durable, in RocksDB beside it or in a real redis-server. It is away for 5 to 60 s
each time; afterwards a worker is added or drained, to see that membership changes again. The
controller's journal lies in a directory that is not the head's.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

import orjson
from rich.console import Console

from cluster.chaos.faults import Saboteur
from cluster.chaos.run import ChaosOptions, report_of, run_script
from cluster.cli.chaos import table_of
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from tests.cluster.harness_head import Head, ray_head
from tests.cluster.harness_serve import served
from workers.clock import SystemClock

WORKERS = 3


async def kill_head(
    saboteur: Saboteur, head: Head, kills: int, away_s: tuple[float, float], seed: int
) -> None:
    """Kill the GCS, start it again after a while, then add or drain a worker."""
    draw = random.Random(seed)
    for number in range(kills):
        length_s = draw.uniform(*away_s)
        async with saboteur.fault("kill head service", (f"away {length_s:.0f} s",)):
            again = await asyncio.to_thread(head.kill_gcs)
            await asyncio.sleep(length_s)
            head.start_gcs(again)
        await saboteur.scale_to(pb.ROLE_EXPERT_WORKER, WORKERS + (number + 1) % 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--storage", choices=["rocksdb", "redis"], default="rocksdb")
    parser.add_argument("--away-s", type=float, nargs=2, default=(5.0, 60.0))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chaos = ChaosOptions(counts={}, seed=options.seed)
    print(f"seed {options.seed}, storage {options.storage}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="journal-") as journal,
        ray_head(options.storage) as head,
        served(
            "--ray-address", head.address, "--model", "demo", "--allow-chaos",
            "--expert-workers", str(WORKERS), "--set", "experts.min=1",
            "--set", "experts.standby=1", "--set", f"control.journal={journal}",
        ) as cluster,
    ):  # fmt: skip

        async def script(saboteur: Saboteur) -> None:
            await kill_head(saboteur, head, options.kills, tuple(options.away_s), options.seed)

        run = asyncio.run(
            run_script(
                cluster.endpoint, chaos, script, clock=SystemClock(),
                progress=lambda done: print(
                    f"{done.window.kind} {' '.join(done.members)}: whole after "
                    f"{done.whole_after_s:.1f} s", flush=True,
                ),
            )
        )  # fmt: skip
    report = report_of(run, chaos, demo_model_path())
    report |= {"storage": options.storage}
    Console(highlight=False, width=120).print(table_of(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    for kind, found in report["problems"].items():
        for problem in found:
            print(f"{kind}: {problem}")
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
