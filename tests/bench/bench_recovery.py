"""What it costs to be able to lose workers, while none is lost: CPU seconds a step, on and off.

    python -m tests.bench.bench_recovery [--pairs 30] [--batch 8] [--steps 100] [--json FILE]

One gateway and two expert workers, in three processes of one build, decode with recovery on and
off in turn; see `harness_plain` for what off means. The bound is one-sided, of the mean of the
pairs' ratios (Student's t).
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from tests.bench.bench_engines import CONTEXT, cpu_seconds, make_checkpoint, of_reference
from tests.bench.harness_plain import plain_gateway
from tests.bench.harness_workers import expert_workers
from workers.gateway.reference import Reference

GOAL = 0.03
T_95 = {10: 1.833, 20: 1.729, 30: 1.699, 60: 1.671}  # one-sided, for so many pairs


def main() -> None:
    """Measure, print, write; the exit status says whether the bound is within the goal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, choices=T_95, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name), options.size)
        room = CONTEXT + options.steps + 8
        with expert_workers(Path(name), 2) as crew:
            step = of_reference(
                Reference(
                    Path(name),
                    context_tokens=room,
                    num_sequences=options.batch,
                    dispatcher=crew.dispatcher,
                )
            )

            def cpu_ms(*, plain: bool) -> float:
                """Return the CPU milliseconds of a decoding step, of all three processes."""
                crew.set_plain(plain=plain)
                with plain_gateway() if plain else contextlib.nullcontext():
                    step(options.batch, CONTEXT, 0)
                    started_s = cpu_seconds()
                    for i in range(options.steps):
                        step(options.batch, 1, CONTEXT + i)
                    return 1000 * (cpu_seconds() - started_s) / options.steps

            for plain in (False, True):
                cpu_ms(plain=plain)
            pairs = []
            for turn in range(options.pairs):
                first = turn % 2 == 0
                figures = {plain: cpu_ms(plain=plain) for plain in (first, not first)}
                pairs.append((figures[False], figures[True]))
            crew.set_plain(plain=False)  # or the farewells would not be understood
    ratios = [on / off for on, off in pairs]
    mean, spread = statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    bound = mean + T_95[len(ratios)] * spread
    report = {
        "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__,
        "size": options.size, "batch": options.batch, "steps": options.steps,
        "on_ms": statistics.median(on for on, _ in pairs),
        "off_ms": statistics.median(off for _, off in pairs),
        "overhead": mean - 1, "bound_95": bound - 1, "goal": GOAL, "pairs": pairs,
        "passed": bound - 1 <= GOAL,
    }  # fmt: skip
    print(json.dumps({k: v for k, v in report.items() if k != "pairs"}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))
    sys.exit(not report["passed"])


if __name__ == "__main__":
    main()
