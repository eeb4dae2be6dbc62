"""Parity with transformers over the full matrix, as a report.

    python -m tests.accept.parity [--json FILE]

Runs the conformance and rank tests with the long matrix included; the report names every test with
its outcome, its seconds and what it recorded (`record_property`).
"""

import argparse
import json
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
AREAS = ("tests/conformance", "tests/ranks")


class Collector:
    """A pytest plugin that keeps one row for each test."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the test's own phase, and any other phase that did not pass."""
        if report.when == "call" or report.outcome != "passed":
            self.rows.append(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 2),
                    **dict(report.user_properties),
                }
            )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    collector = Collector()
    areas = [str(ROOT / area) for area in AREAS]
    status = pytest.main(["-m", "not gpu and not ray", *areas], plugins=[collector])
    report = {
        "passed": status == pytest.ExitCode.OK,
        "outcomes": Counter(row["outcome"] for row in collector.rows),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.platform(),
        "tests": collector.rows,
    }
    print(json.dumps({key: value for key, value in report.items() if key != "tests"}))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
