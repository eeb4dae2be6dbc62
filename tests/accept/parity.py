"""The full matrix against transformers, and of arrangements against the experts in one process.

    python -m tests.accept.parity [--json FILE]

Runs the conformance and rank tests with nothing left out and writes what passed.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable, "-m", "pytest", "-m", "not gpu and not ray", "-q", "-rA",
    "tests/conformance", "tests/ranks",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    ended = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, check=False)
    print(ended.stdout[-6000:], ended.stderr[-2000:], sep="\n")
    outcomes: dict[str, list[str]] = {}
    for outcome, test in re.findall(
        r"^(PASSED|FAILED|ERROR|SKIPPED) ((?:tests/|\[).+)$", ended.stdout, re.M
    ):
        outcomes.setdefault(outcome.lower(), []).append(test)
    report = {
        "command": " ".join(["pytest", *COMMAND[3:]]),
        "seconds": time.perf_counter() - start,
        "counts": {outcome: len(tests) for outcome, tests in outcomes.items()},
        "tests": outcomes,
        "passed": ended.returncode == 0,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2))
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
