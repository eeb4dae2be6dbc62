"""Run seeds of the fault lab, or replay one.

python -m tests.chaos.lab --seed N [--trace] [--mutation NAME]
python -m tests.chaos.lab --seeds 1000 [--first 0]
"""

import argparse
import contextlib
import sys
import time

from tests.chaos.lab.cluster import run_seed
from tests.chaos.lab.mutations import MUTATIONS
from tests.chaos.lab.scenarios import SCENARIOS, quiet, run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mutation", choices=MUTATIONS)
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    quiet()
    if options.seed is not None:
        sys.exit(replay(options))
    started_s = time.perf_counter()
    batch = run_all(options.first, options.seeds, options.processes)
    took_s = time.perf_counter() - started_s
    for name, seed, violation in batch.violations:
        print(f"{name} seed {seed}: {violation}")
        print(f"  python -m tests.chaos.lab --seed {seed} --trace")
    print(f"{options.seeds} seeds in {took_s:.1f} s, {len(batch.violations)} violations")
    sys.exit(bool(batch.violations))


def replay(options: argparse.Namespace) -> bool:
    """Run one seed again; says whether it fails."""
    mutation = MUTATIONS[options.mutation].apply() if options.mutation else contextlib.nullcontext()
    with mutation:
        outcome = run_seed(options.seed)
        if options.trace:
            print("\n".join(outcome.trace))
        print(f"cluster: {outcome.violation or 'holds'} (faults: {', '.join(outcome.faults)})")
        others = {name: run(options.seed) for name, run in SCENARIOS.items() if name != "cluster"}
    for name, violation in others.items():
        print(f"{name}: {violation or 'holds'}")
    return bool(outcome.violation or any(others.values()))


if __name__ == "__main__":
    main()
