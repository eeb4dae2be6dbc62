"""Placements by load against EPLB's and round-robin, with the same slots and replica choice.

    python -m tests.bench.bench_placement [--layers 60] [--json FILE] > tables.md

Prints the tables of docs/placement.md. What is compared is the mean number of distinct experts that
the busiest worker of a layer computes for a batch of so many rows. Placements are made from one
part of a trace and judged on another. No placement can be below the bound: all distinct experts of
a batch, shared evenly.
"""

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cluster.cli.trace import record_trace
from cluster.control.placing.forecast import busiest_L
from cluster.control.placing.placer import Target, plan_target
from cluster.control.placing.survival import survival_of
from cluster.control.placing.trace import activation_of
from cluster.control.planner import Seat
from cluster.demo.path import demo_model_path
from examples.demo_model import corpus
from tests.bench.eplb import by_token_count, round_robin
from workers.placement import ExpertId, MemberId, Placement

EXPERTS, TOP_K = 512, 10
WORKERS = (8, 16, 32, 64, 128, 256)
BATCHES = (1, 8, 64, 512)
HISTORY_ROWS = 4096
NUM_JUDGED = {1: 192, 8: 96, 64: 24, 512: 24}  # of each layer: small batches differ more
EXPERT_BYTES = 3 * 4096 * 1024 * 2  # of the 397B model, in bfloat16

Batches = Callable[[int], NDArray[np.bool_]]


def zipf_LE(layers: int, exponent: float, draw: np.random.Generator) -> NDArray[np.float64]:
    """Return popularities, in another order in each layer."""
    weights = np.arange(1, EXPERTS + 1) ** -exponent
    return draw.permuted(np.tile(weights, (layers, 1)), axis=1)


def drawn_rows(
    popularity_E: NDArray[np.float64], num_rows: int, draw: np.random.Generator
) -> NDArray[np.int64]:
    """Draw the experts of rows without replacement, by popularity, [rows, K]."""
    score = np.log(popularity_E) + draw.gumbel(size=(num_rows, len(popularity_E)))
    return np.argpartition(-score, TOP_K, axis=1)[:, :TOP_K]


def shares_of(popularity_LE: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    counts = [
        np.bincount(drawn_rows(p_E, HISTORY_ROWS, draw).ravel(), minlength=EXPERTS)
        for p_E in popularity_LE
    ]
    return np.stack(counts) / HISTORY_ROWS


def batches_LNE(
    popularity_LE: NDArray[np.float64], rows: int, draw: np.random.Generator
) -> NDArray[np.bool_]:
    found = np.zeros((len(popularity_LE), NUM_JUDGED[rows], EXPERTS), dtype=bool)
    for layer, popularity_E in enumerate(popularity_LE):
        for batch in range(NUM_JUDGED[rows]):
            found[layer, batch, drawn_rows(popularity_E, rows, draw).ravel()] = True
    return found


def seats_of(num_workers: int, room: int, layers: int) -> dict[MemberId, Seat]:
    """Return workers whose usable slots are `room` a layer; one more stays free."""
    return {MemberId(f"w{i:03d}", 1): Seat(room * layers + 1) for i in range(num_workers)}


def planned(
    shares_LE: NDArray[np.float64], workers: int, room: int, rows: int, *, floor: int, **more: Any
) -> tuple[Target, float]:
    """Return our target and the seconds of one core that it took."""
    layers, experts = shares_LE.shape
    started_s = time.process_time()
    target = plan_target(
        Placement("bench", layers, experts),
        seats_of(workers, room, layers),
        more.pop("held", {}),
        activation_of(shares_LE, rows),
        floor=floor,
        **more,
    )
    return target, time.process_time() - started_s


def compared(
    name: str, shares_LE: NDArray[np.float64], batches: Batches, workers: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yield a line for every number of workers, slots and batch size."""
    experts = shares_LE.shape[1]
    judged = {rows: batches(rows) for rows in BATCHES}
    for count in workers:
        share = -(-experts // count)
        for floor, room in ((1, share + max(1, share // 8)), (2, 2 * share + 1)):
            eplb = by_token_count(shares_LE, count, room)
            floored = by_token_count(shares_LE, count, room, floor=floor)
            naive = round_robin(shares_LE, count, room)
            for rows in BATCHES:
                target, plan_s = planned(shares_LE, count, room, rows, floor=floor)
                batch = judged[rows]
                ours, survived = target.holds_LEW, survival_of(target.holds_LEW)
                theirs = survival_of(eplb)
                yield {
                    "trace": name, "workers": count, "slots": room, "floor": floor, "rows": rows,
                    "bound": float(np.ceil(batch.sum(axis=2) / count).mean()),
                    "ours": float(busiest_L(ours, batch).mean()),
                    "eplb": float(busiest_L(eplb, batch).mean()),
                    "floored": float(busiest_L(floored, batch).mean()),
                    "round_robin": float(busiest_L(naive, batch).mean()),
                    "plan_s": plan_s,
                    "parked_by_one": len(survived.parked_by_one),
                    "eplb_parked_by_one": len(theirs.parked_by_one),
                    "pairs_survived": survived.pairs_survived,
                    "parked_by_pair": survived.parked_by_pair,
                }  # fmt: skip


def shifting(
    layers: int, workers: int, rows: int, draw: np.random.Generator, *, epochs: int = 6
) -> Iterator[dict[str, Any]]:
    """Yield a line for every epoch of a load in which a tenth of the experts change places."""
    share = -(-EXPERTS // workers)
    room = share + max(1, share // 8)
    popularity_LE = zipf_LE(layers, 1.0, draw)
    shares_LE = shares_of(popularity_LE, draw)
    first, _ = planned(shares_LE, workers, room, rows, floor=1)
    eplb_LEW = by_token_count(shares_LE, workers, room)
    bounded = full = first
    for epoch in range(1, epochs + 1):
        for popularity_E in popularity_LE:
            moved = draw.choice(EXPERTS, EXPERTS // 10, replace=False)
            popularity_E[moved] = popularity_E[draw.permutation(moved)]
        shares_LE = shares_of(popularity_LE, draw)
        batch = batches_LNE(popularity_LE, rows, draw)
        bounded, plan_s = planned(
            shares_LE, workers, room, rows, floor=1, held=holdings(bounded), max_moves=2048
        )
        full, _ = planned(shares_LE, workers, room, rows, floor=1, held=holdings(full))
        before_LEW, eplb_LEW = eplb_LEW, by_token_count(shares_LE, workers, room)
        yield {
            "epoch": epoch, "workers": workers, "rows": rows,
            "bound": float(np.ceil(batch.sum(axis=2) / workers).mean()),
            "stays": float(busiest_L(first.holds_LEW, batch).mean()),
            "bounded": float(busiest_L(bounded.holds_LEW, batch).mean()),
            "bounded_moves": bounded.num_moves,
            "ours": float(busiest_L(full.holds_LEW, batch).mean()),
            "moves": full.num_moves,
            "eplb": float(busiest_L(eplb_LEW, batch).mean()),
            "eplb_moves": int((eplb_LEW & ~before_LEW).sum()),
            "plan_s": plan_s,
        }  # fmt: skip


def holdings(target: Target) -> dict[MemberId, dict[ExpertId, int]]:
    return {w: {e: slot for slot, e in enumerate(target.held_by(w))} for w in target.workers}


def demo_trace(seed: int) -> tuple[NDArray[np.float64], Batches]:
    """Record the shipped model on questions of its corpus; half to plan by, half to judge by."""
    draw = random.Random(seed)
    kinds = (corpus.capital, corpus.opposite, corpus.next_day, corpus.counting, corpus.sorting)
    questions = [str(draw.choice(kinds)(draw).messages[0]["content"]) for _ in range(192)]
    past, future = (
        record_trace(demo_model_path(), half, max_tokens=48, seed=seed)
        for half in (questions[::2], questions[1::2])
    )
    return past.shares_LE(), lambda rows: future.batches_LNE(rows, 8 * NUM_JUDGED[rows], seed)


def line(cells: list[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def print_comparison(found: list[dict[str, Any]]) -> None:
    print(line(["trace", "workers", "slots a layer", "floor", "rows", "bound", "ours", "EPLB",
                "EPLB, same floor", "round-robin", "ours / EPLB", "ours / EPLB, same floor",
                "plan, s"]))  # fmt: skip
    print(line(["---"] * 13))
    for row in found:
        print(line([
            row["trace"], row["workers"], row["slots"], row["floor"], row["rows"],
            *(f"{row[k]:.2f}" for k in ("bound", "ours", "eplb", "floored", "round_robin")),
            f"{row['ours'] / row['eplb']:.2f}", f"{row['ours'] / row['floored']:.2f}",
            f"{row['plan_s']:.2f}",
        ]))  # fmt: skip


def print_survival(found: list[dict[str, Any]]) -> None:
    print(line(["trace", "workers", "slots a layer", "floor", "parked by the worst choice of one",
                "EPLB's", "pairs survived", "most parked by a pair"]))  # fmt: skip
    print(line(["---"] * 8))
    for row in found:
        if row["rows"] == 64:
            print(line([
                row["trace"], row["workers"], row["slots"], row["floor"], row["parked_by_one"],
                row["eplb_parked_by_one"], f"{100 * row['pairs_survived']:.0f} %",
                row["parked_by_pair"],
            ]))  # fmt: skip


def print_shifting(found: list[dict[str, Any]]) -> None:
    print(line(["epoch", "bound", "never moved", "ours, at most 2048 moves", "GB", "ours", "GB",
                "EPLB anew", "GB", "plan, s"]))  # fmt: skip
    print(line(["---"] * 10))
    for row in found:
        print(line([
            row["epoch"], f"{row['bound']:.2f}", f"{row['stays']:.2f}",
            f"{row['bounded']:.2f}", f"{row['bounded_moves'] * EXPERT_BYTES / 1e9:.0f}",
            f"{row['ours']:.2f}", f"{row['moves'] * EXPERT_BYTES / 1e9:.0f}",
            f"{row['eplb']:.2f}", f"{row['eplb_moves'] * EXPERT_BYTES / 1e9:.0f}",
            f"{row['plan_s']:.2f}",
        ]))  # fmt: skip


def print_worse(name: str, key: str, found: list[dict[str, Any]]) -> None:
    worse = [row for row in found if row["ours"] > 1.005 * row[key]]
    print(f"\nmore than 0.5 % worse than {name}: {len(worse)} of {len(found)}")
    for row in worse:
        print(f"  {row['trace']}, {row['workers']} workers, floor {row['floor']}, "
              f"{row['rows']} rows: {row['ours']:.2f} against {row[key]:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="*", default=WORKERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw = np.random.default_rng(options.seed)
    machine = {
        "machine": platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(), "numpy": np.__version__,
    }  # fmt: skip
    print(f"seed {options.seed}; {machine}; command: {' '.join(sys.argv)}\n", flush=True)

    shares_LE, batches = demo_trace(options.seed)
    found = list(compared("demo", shares_LE, batches, (4, 8, 16, 32)))
    for exponent in (0.6, 1.0):
        popularity_LE = zipf_LE(options.layers, exponent, draw)

        def batches_of(rows: int, popularity_LE: NDArray[np.float64] = popularity_LE) -> Any:
            return batches_LNE(popularity_LE, rows, draw)

        shares_LE = shares_of(popularity_LE, draw)
        found += compared(f"Zipf {exponent}", shares_LE, batches_of, tuple(options.workers))
    print_comparison(found)
    print()
    print_survival(found)
    print()
    shifted = list(shifting(options.layers, 64, 64, draw))
    print_shifting(shifted)
    print_worse("EPLB with the same floor", "floored", found)
    print_worse("EPLB", "eplb", found)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine, "compared": found, "shifting": shifted}
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()
