"""The fault lab at length: seeds without a violation, all mutations found, all pairs visited.

python -m tests.accept.fault_lab [--seeds 100000] [--json FILE]
"""

import argparse
import os
import platform
import random
import sys
import time
from pathlib import Path

import orjson

from tests.chaos.lab.coverage import expected
from tests.chaos.lab.scenarios import Batch, find_mutations, quiet, run_all

MUTATION_LIMIT = 10_000
TOLD_EVERY = 5_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--first", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet()
    print(f"{options.seeds} seeds from {options.first}", flush=True)
    started_s = time.perf_counter()
    num_told = 0

    def tell(num_seeds: int, so_far: Batch) -> None:
        nonlocal num_told
        for name, seed, violation in so_far.violations[num_told:]:
            print(f"{name} seed {seed}: {violation}", flush=True)
            print(f"  python -m tests.chaos.lab --seed {seed} --trace", flush=True)
        num_told = len(so_far.violations)
        if num_seeds % TOLD_EVERY == 0:
            rate = num_seeds / (time.perf_counter() - started_s)
            print(
                f"{num_seeds} seeds, {len(so_far.violations)} violations, {rate:.1f} seeds/s",
                flush=True,
            )

    batch = run_all(options.first, options.seeds, options.processes, tell)
    took_s = time.perf_counter() - started_s
    print(f"{took_s:.0f} s, {options.seeds / took_s:.1f} seeds/s", flush=True)
    missing = sorted(expected() - set(batch.visited))
    print(f"{len(batch.visited)} pairs of state and event visited; not visited: {missing}")
    found = find_mutations(MUTATION_LIMIT, options.processes)
    for name, hit in found.items():
        print(f"{name}: {f'seed {hit[0]}: {hit[1]}' if hit else 'NOT FOUND'}")
    passed = not batch.violations and not missing and all(found.values())
    report = {
        "machine": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "seeds": options.seeds,
        "first": options.first,
        "seconds": took_s,
        "violations": batch.violations,
        "visited": {f"{state}: {event}": n for (state, event), n in batch.visited.most_common()},
        "not_visited": missing,
        "mutations": found,
        "passed": passed,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
