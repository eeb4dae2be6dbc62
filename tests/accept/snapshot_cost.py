"""What snapshots cost while nothing fails, and what going on from one costs.

    python -m tests.accept.snapshot_cost [--pairs 30] [--json FILE] [--plot FILE]

Cost: CPU seconds of all gateway processes for the same decode work, on a cluster that takes
snapshots and on one that takes none, which do it side by side, so that a machine whose speed drifts
favours neither; the bound is the upper end of a one-sided 95 % interval of the mean relative
difference. Replay: CPU time from a resumed request's arrival to its first new token, by how many
known tokens lie behind its snapshot; in this process. Lives: CPU time for each token of requests
that lose their gateway every so many tokens, by the interval of snapshots, beside the interval that
the two costs before predict as the best.
"""

import argparse
import json
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from cluster.demo.path import demo_model_path
from tests.cluster.harness_serve import Served, served
from workers.clock import SystemClock
from workers.gateway.options import GatewayOptions
from workers.gateway.outbox import Keeping
from workers.gateway.snapshot import Holder, Shard, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.gateway.worker import GatewaySpec, GatewayWorker
from workers.mesh import Rendezvous
from workers.placement import MemberId
from workers.types import Request, Sampling, Stopping, TokenEvent

INTERVAL = 64
CONCURRENCY = 8
TOKENS = 256
REPLAYED = (0, 8, 16, 32, 64, 128, 256)
REPEATS = 15
INTERVALS = (2, 4, 8, 16, 32, 64, 128, 256)
TOKENS_PER_LIFE = 100  # on average
LIVES_TOKENS = 900  # of each request that is measured over its lives
LIVES_ROUNDS = 2
LIMIT_PERCENT = 3.0
HOLDER = Holder("here.1", "")
T95 = 1.70  # Student's, one-sided, for about 29 degrees of freedom


def cpu_s(pids: Sequence[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(t.user + t.system for t in times)


def decode(cluster: Served, pids: Sequence[int]) -> float:
    """Return the CPU seconds that the gateways take for the work of one sample."""
    before_s = cpu_s(pids)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(
            pool.map(
                lambda i: cluster.generate("And it came to pass " * (1 + i % 3), max_tokens=TOKENS),
                range(CONCURRENCY),
            )
        )
    return cpu_s(pids) - before_s


def measure_cost(pairs: int) -> dict[str, Any]:
    command = ["--model", "demo", "--gateways", "2", "--expert-workers", "0"]
    key = "gateways.snapshot_tokens"
    with (
        served(*command, "--set", f"{key}={INTERVAL}") as on,
        served(*command, "--set", f"{key}=0") as off,
    ):
        pids = {id(c): [m["pid"] for m in c.members("GATEWAY")] for c in (on, off)}
        for cluster in (on, off):
            decode(cluster, pids[id(cluster)])
        samples = []
        with ThreadPoolExecutor(2) as pool:
            for number in range(pairs):
                first, second = pool.map(lambda c: decode(c, pids[id(c)]), (on, off))
                samples.append((first, second))
                print(f"pair {number}: on {first:.2f} s, off {second:.2f} s", flush=True)
        stored = sum(
            value
            for member in on.members("GATEWAY")
            for name, value in on.metrics(member).items()
            if name.startswith("expertmesh_gateway_snapshots_stored_total")
        )
    percents = [100 * (a - b) / b for a, b in samples]
    mean = statistics.fmean(percents)
    error = statistics.stdev(percents) / math.sqrt(len(percents))
    extra_s = statistics.fmean(a - b for a, b in samples)
    return {
        "samples_s": samples,
        "tokens_per_sample": CONCURRENCY * TOKENS,
        "mean_percent": mean,
        "median_percent": statistics.median(percents),
        "upper_95_percent": mean + T95 * error,
        "snapshots": stored,
        "ms_per_snapshot": 1000 * extra_s * (pairs + 1) / max(stored, 1),  # one sample before
    }


class Bench:
    """One gateway in this process, and the store of its snapshots."""

    def __init__(self, interval: int = 1) -> None:
        self.store = SnapshotStore(2**30, SystemClock())
        spec = GatewaySpec(
            member=MemberId("gateway", 1), rank=0, size=1, host="127.0.0.1",
            model_dir=str(demo_model_path()),
            options=GatewayOptions(
                max_sequences=4, context_tokens=1024, local_experts=True, snapshot_tokens=interval
            ),
        )  # fmt: skip
        self.worker = GatewayWorker(spec, keeping=Keeping(self._push))
        self.worker.keep_with(HOLDER, "w")
        self.worker.open()
        self.worker.join(Rendezvous("", 0, ""))
        self.worker.load()
        self.worker.start()

    def run(self, request: Request, snapshots: dict[int, Any], tokens: int) -> list[int]:
        """Return the next tokens of a request, which is then cancelled."""
        found: list[int] = []
        done = threading.Event()

        def sink(events: Sequence[TokenEvent]) -> None:
            found.extend(t for event in events for t in event.token_ids)
            if len(found) >= tokens:
                done.set()

        self.worker.submit(request, sink, snapshots)
        assert done.wait(60), self.worker.failure
        self.worker.abort(request.request_id)
        return found[:tokens]

    def live(self, request: Request, deaths: Sequence[int]) -> float:
        """Return the CPU seconds of a request that is lost and goes on after so many tokens each.

        As with a real gateway, it goes on from the newest snapshot that is whole by then.
        """
        start_s = time.process_time()
        tokens: list[int] = []
        for assignment, life in enumerate(deaths, start=1):
            known = len(request.prompt_token_ids) + len(tokens)
            newest = self.store.newest(request.request_id, 0, known - 1)
            again = replace(request, assignment=assignment, emitted=(tuple(tokens),))
            tokens += self.run(again, {0: newest} if newest is not None else {}, life)
        return time.process_time() - start_s

    def _push(self, shard: Shard, holder: Holder) -> None:
        verdict = self.store.put(shard)
        self.worker.stored(shard.stamp, holder, verdict)
        assert verdict is Verdict.COMPLETE


def measure_replay() -> list[dict[str, float]]:
    """Return CPU and wall times to the first new token, by replayed tokens."""
    bench = Bench()
    request = Request(
        request_id="r", prompt_token_ids=tuple(range(5, 45)), assignment=1,
        sampling=Sampling(temperature=0.0), stopping=Stopping(max_tokens=600, ignore_eos=True),
    )  # fmt: skip
    tokens = bench.run(request, {}, 8)
    snapshot = bench.store.newest("r", 0, 48)
    assert snapshot is not None
    tokens += bench.run(replace(request, emitted=(tuple(tokens),)), {}, 400)
    rows = []
    for replayed in REPLAYED:
        had = snapshot.stamp.position + 1 + replayed - len(request.prompt_token_ids)
        times = []
        for number in range(REPEATS):
            again = replace(
                request, request_id=f"{replayed}/{number}", assignment=2,
                emitted=(tuple(tokens[:had]),),
            )  # fmt: skip
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            bench.run(again, {0: snapshot}, 1)
            times.append((time.process_time() - start_cpu_s, time.perf_counter() - start_s))
        cpu, wall = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        rows.append({"replayed": replayed, "cpu_ms": cpu, "wall_ms": wall})
        print(f"{replayed:4d} tokens: {cpu:.1f} ms CPU, {wall:.1f} ms", flush=True)
    bench.worker.close()
    return rows


def measure_lives(seed: int = 0) -> list[dict[str, float]]:
    """Return the CPU time for a token, by the interval of snapshots, as a median of rounds."""
    draw = random.Random(seed)
    deaths: list[int] = []
    while sum(deaths) < LIVES_TOKENS:
        life = min(1 + int(draw.expovariate(1 / TOKENS_PER_LIFE)), LIVES_TOKENS - sum(deaths))
        deaths.append(life)
    print(f"seed {seed}: lives of {deaths} tokens", flush=True)
    request = Request(
        request_id="r", prompt_token_ids=tuple(range(5, 45)), sampling=Sampling(temperature=0.0),
        stopping=Stopping(max_tokens=LIVES_TOKENS + 1, ignore_eos=True),
    )  # fmt: skip
    costs_s: dict[int, list[float]] = {interval: [] for interval in INTERVALS}
    for number in range(LIVES_ROUNDS + 1):  # the first warms up
        for interval in INTERVALS:
            bench = Bench(interval)
            spent_s = bench.live(replace(request, request_id=f"r-{number}"), deaths)
            bench.worker.close()
            if number:
                costs_s[interval].append(spent_s)
    rows = [
        {"interval": k, "cpu_ms": 1000 * statistics.median(spent_s) / LIVES_TOKENS}
        for k, spent_s in costs_s.items()
    ]
    for row in rows:
        print(f"every {row['interval']:3.0f} tokens: {row['cpu_ms']:.3f} ms a token", flush=True)
    return rows


def optimum(snapshot_ms: float, token_ms: float, tokens_per_death: float) -> float:
    """Return the interval at which snapshots and replay cost least together.

    A token costs snapshot_ms / k for snapshots, and a death k / 2 tokens of replay.
    """
    return math.sqrt(2 * tokens_per_death * snapshot_ms / token_ms)


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4))
    rows = report["replay"]
    for name in ("cpu_ms", "wall_ms"):
        left.plot([r["replayed"] for r in rows], [r[name] for r in rows], "o-", label=name)
    left.set(xlabel="tokens replayed", ylabel="ms to the first new token")
    left.legend()
    lives = report["lives"]
    middle.plot(
        [r["interval"] for r in lives], [r["cpu_ms"] for r in lives], "o-", label="measured"
    )
    middle.axvline(
        report["optimum"][f"{TOKENS_PER_LIFE}"], linestyle=":", label="predicted optimum"
    )
    middle.set(
        xscale="log", xlabel=f"interval k, a death in {TOKENS_PER_LIFE} tokens",
        ylabel="CPU ms a token",
    )  # fmt: skip
    middle.legend()
    intervals = [2**n for n in range(2, 15)]
    for name, best in report["optimum"].items():
        per_death = float(name)
        costs = [
            report["cost"]["ms_per_snapshot"] / k + k / 2 * report["token_ms"] / per_death
            for k in intervals
        ]
        (line,) = right.plot(intervals, costs, label=f"a death in {per_death:g} tokens")
        right.axvline(best, color=line.get_color(), linestyle=":")
    right.set(xscale="log", yscale="log", xlabel="interval k", ylabel="CPU ms a token")
    right.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = measure_replay()
    lives = measure_lives()
    cost = measure_cost(options.pairs)
    first, last = rows[0], rows[-1]
    token_ms = (last["cpu_ms"] - first["cpu_ms"]) / (last["replayed"] - first["replayed"])
    report: dict[str, Any] = {"cost": cost, "replay": rows, "lives": lives, "token_ms": token_ms}
    snapshot_ms = max(cost["ms_per_snapshot"], 0.01)
    deaths = (TOKENS_PER_LIFE, 1e4, 1e6, 1e8)
    report["optimum"] = {f"{n:g}": optimum(snapshot_ms, token_ms, n) for n in deaths}
    report["passed"] = cost["upper_95_percent"] <= LIMIT_PERCENT
    print(
        f"snapshots every {INTERVAL} tokens cost {cost['mean_percent']:.2f} % CPU, at most "
        f"{cost['upper_95_percent']:.2f} % (95 %); {cost['ms_per_snapshot']:.2f} ms each; a "
        f"replayed token {token_ms:.3f} ms; best interval {report['optimum']}"
    )
    for path in (options.json, options.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))
    if options.plot:
        plot(report, options.plot)
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
