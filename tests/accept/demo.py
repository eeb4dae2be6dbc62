"""`make demo`, measured: seconds and the peak memory of all its processes.

    python -m tests.accept.demo [--json FILE]

The environment must be set up already: this is the second run. Memory is the sum of the processes'
proportional set sizes, so that pages they share count once.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

MAX_S = 60.0
MAX_BYTES = 6 * 2**30
ROOT = Path(__file__).parents[2]


def memory_bytes(root: psutil.Process) -> int:
    """Return the proportional set size of a process and all that it started."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(["make", "demo"], cwd=ROOT) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, memory_bytes(root))
            time.sleep(0.5)
    seconds = time.perf_counter() - start
    report = {
        "status": process.returncode, "seconds": seconds, "peak_bytes": peak,
        "passed": process.returncode == 0 and seconds < MAX_S and peak < MAX_BYTES,
    }  # fmt: skip
    print(json.dumps(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2))
    sys.exit(not report["passed"])


if __name__ == "__main__":
    main()
