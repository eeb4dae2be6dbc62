"""Experts move all the time under load, and no client may be able to tell.

    python -m tests.accept.rebalance [--minutes 10] [--every-s 3] [--json FILE]

A real cluster places its experts anew every few seconds, each time for another imagined load, so
that replicas move without end. Every sequence is replayed through the experts in one process. The
gaps between the messages of a sequence are set beside those of the same load on a cluster whose
experts stay where they are, for as long: the longest of more gaps is longer.
"""

import argparse
import asyncio
import itertools
import sys
from pathlib import Path
from typing import Any

import orjson

from cluster.chaos.faults import Saboteur
from cluster.chaos.history import Answer
from cluster.chaos.run import ChaosOptions, Run, report_of, run_script
from cluster.chaos.stalls import percentile
from cluster.demo.path import demo_model_path
from tests.cluster.harness_serve import served
from workers.clock import SystemClock

LOOK_S = 0.5
STALL_S = 0.3  # what the death of a worker may cost; a move must cost less
TIMES_STATIC = 2.0


def gaps_s(answers: list[Answer]) -> list[float]:
    """Return the time between two messages of a sequence, of all sequences, sorted."""
    return sorted(
        after - before
        for answer in answers
        for sequence in range(answer.ask.num_sequences)
        for before, after in itertools.pairwise(answer.times_s(sequence))
    )


def summary_ms(gaps: list[float]) -> dict[str, float]:
    points = {"p50": 50, "p99": 99, "p99.9": 99.9, "max": 100}
    return {name: round(1000 * percentile(gaps, at), 1) for name, at in points.items()}


def run(options: argparse.Namespace, every_s: float, length_s: float) -> tuple[Run, dict[str, int]]:
    """Serve and load a cluster; returns what clients saw, and how much was moved meanwhile."""
    chaos = ChaosOptions(counts={}, concurrency=options.concurrency, seed=options.seed)
    moved = {"rebalances": 0, "moves": 0, "views": 0}

    async def watch(saboteur: Saboteur) -> None:
        until_s = SystemClock().now_s() + length_s
        while SystemClock().now_s() < until_s:
            await asyncio.sleep(LOOK_S)
            status = await saboteur.status()
            if status is None:
                continue
            moved["views"] = status.view.version
            if status.last_rebalance.count > moved["rebalances"]:
                moved["rebalances"] = status.last_rebalance.count
                moved["moves"] += status.last_rebalance.num_moves

    command = [
        "--model", "demo", "--allow-chaos", "--gateways", str(options.gateways),
        "--expert-workers", str(options.workers), "--set", f"experts.floor={options.floor}",
        "--set", f"control.rebalance_s={every_s}", "--set", "control.rebalance_always=true",
    ]  # fmt: skip
    print(f"seed {options.seed}; expertmesh serve {' '.join(command)}", flush=True)
    with served(*command) as cluster:
        work = run_script(cluster.endpoint, chaos, watch, clock=SystemClock())
        return asyncio.run(work), moved


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--static-minutes", type=float, help="as long as the other by default")
    parser.add_argument("--every-s", type=float, default=3)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floor", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    chaos = ChaosOptions(counts={}, concurrency=options.concurrency, seed=options.seed)
    static, _ = run(options, 0, 60 * (options.static_minutes or options.minutes))
    moving, moved = run(options, options.every_s, 60 * options.minutes)
    judged = report_of(moving, chaos, demo_model_path())
    normal, seen = summary_ms(gaps_s(static.answers)), summary_ms(gaps_s(moving.answers))
    expected = 60 * options.minutes / (4 * options.every_s)  # a move under way delays the next
    longest_ms = max(1000 * STALL_S, TIMES_STATIC * normal["max"])
    report: dict[str, Any] = {
        "options": {k: str(v) for k, v in vars(options).items()},
        "machine": judged["machine"],
        **{k: judged[k] for k in ("requests", "sequences", "tokens", "num_problems", "problems")},
        "replay": judged["replay"],
        "moved": moved,
        "gaps_static_ms": normal,
        "gaps_moving_ms": seen,
        "passed": judged["passed"]
        and seen["max"] <= longest_ms
        and moved["rebalances"] >= expected,
    }
    print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
