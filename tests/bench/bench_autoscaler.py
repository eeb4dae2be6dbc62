"""A day of load in virtual time: worker-hours and late requests of three ways to choose a number.

    python -m tests.bench.bench_autoscaler [--seeds 0 1 2] [--json FILE]

The decisions are the product's (`cluster.control.scaling`); the cluster is a model of its step
times, so nothing here is a measurement of a cluster. Modelled is a fleet of the 397B model's shape
on GPUs: two gateways, whose steps take a fixed time, links, and for each layer as long as the
busiest worker reads the experts that the batch activates. The day is drawn from a seed: two humps,
a quiet night, bursts of some minutes. (a) as many workers all day as the peak takes, found by
trying; (b) more whenever sequences wait at the gateways and fewer when none does, which is all that
a scaler sees who knows queues only; (c) the product's policy.
"""

import argparse
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cluster.control.options import ExpertScaling
from cluster.control.scaling.policy import Appraisal, appraise_experts
from cluster.control.scaling.pool import PoolScaler
from cluster.control.scaling.signals import ExpertSignals
from cluster.control.scaling.trend import Trend

FEWEST, MOST = 16, 96  # workers; 16 hold two copies of every expert
LAYERS, EXPERTS, TOP_K = 60, 512, 10
EXPERT_S = 25.2e6 / 3.0e12  # 3 x 4096 x 1024 weights of 2 bytes, read at 3 TB/s
IMBALANCE = 1.25  # of the busiest worker over the mean, as placement leaves it
FIXED_S = 0.009  # of a gateway's step: attention, states, head
LINK_S = 60e-6  # a layer: both ways
GATEWAYS, MOST_SEQUENCES = 2, 256
PREFILL_TOKENS_S = 20_000.0
START_S = 240.0  # from wanted to serving: a node, a process, weights
LATE_TOKEN_S, LATE_FIRST_S = 0.040, 2.0  # mean time a token, and to the first
PERIOD_S = 5


@dataclass(frozen=True, slots=True)
class Day:
    """How many requests begin in each second, and of what size each is."""

    counts: NDArray[np.int64]
    prompts: NDArray[np.float64]
    completions: NDArray[np.float64]


def draw_day(seed: int, hours: tuple[int, int] = (0, 24)) -> Day:
    """Return the requests of these hours of a day: the same for the same seed."""
    draw = np.random.default_rng(seed)
    hour = np.arange(24 * 3600) / 3600
    humps = np.exp(-((hour - 10.5) ** 2) / 8) + 0.9 * np.exp(-((hour - 15.5) ** 2) / 10)
    rate = 0.7 + 4.2 * humps
    for _ in range(12):
        start, length_s = draw.integers(0, len(hour)), int(draw.uniform(120, 900))
        rate[start : start + length_s] *= draw.uniform(1.3, 2.2)
    counts = draw.poisson(rate)[3600 * hours[0] : 3600 * hours[1]]
    number = int(counts.sum())
    prompts = draw.lognormal(math.log(1200), 0.9, number).clip(20, 60_000)
    completions = draw.lognormal(math.log(350), 0.7, number).clip(8, 4_000)
    return Day(counts, prompts, completions)


def step_s(batch: float, workers: int, busy: float) -> tuple[float, float]:
    """Return the time of a gateway's step, and for how long the busiest worker computes in it.

    `busy` is the share of time in which workers compute for anybody: calls wait behind others'.
    """
    activated = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** batch)
    compute_s = LAYERS * EXPERT_S * max(IMBALANCE * activated / workers, min(activated, 1))
    wait = 0.5 * busy / max(1 - busy, 0.05)  # of a computation: a queue with even service
    return FIXED_S + LAYERS * LINK_S + compute_s * (1 + wait), compute_s


@dataclass(slots=True)
class Moment:
    """What a scaler may look at."""

    serving: int
    busy: float
    queue_age_s: float
    waiting_share: float
    waiting: int
    tokens: int


Scaler = Callable[[Moment, int, float], int]


def policy(options: ExpertScaling) -> Scaler:
    """Return (c): what the controller does."""
    pool, trend = PoolScaler(options), Trend(START_S)

    def decide(seen: Moment, wanted: int, now_s: float) -> int:
        trend.note({"all": seen.tokens}, now_s)
        signals = ExpertSignals(
            serving=seen.serving,
            busy=seen.busy * seen.serving,
            busiest=seen.busy,
            queue_age_s=seen.queue_age_s,
            waiting=seen.waiting_share,
        )
        appraisal = appraise_experts(signals, options, trend.growth)
        change = pool.decide(
            appraisal, wanted=wanted, serving=seen.serving, fewest=FEWEST, now_s=now_s
        )
        return change.after if change else wanted

    return decide


def by_queue(options: ExpertScaling) -> Scaler:
    """Return (b): the same patience and bounds, and only the queue at the gateways to look at."""
    pool = PoolScaler(options)

    def decide(seen: Moment, wanted: int, now_s: float) -> int:
        step = max(1, seen.serving // 4)
        appraisal = Appraisal(
            enough=seen.serving + step if seen.waiting else seen.serving,
            least=wanted if seen.waiting else FEWEST,
            why="queue",
        )
        change = pool.decide(
            appraisal, wanted=wanted, serving=seen.serving, fewest=FEWEST, now_s=now_s
        )
        return change.after if change else wanted

    return decide


def fixed(number: int) -> Scaler:
    """Return (a)."""
    return lambda _seen, _wanted, _now_s: number


@dataclass(slots=True)
class Outcome:
    """What a day cost, and how many of its requests were late."""

    worker_hours: float
    late: float
    most: int
    changes: int


class Fleet:
    """Sequences that run or wait at the gateways, second by second."""

    def __init__(self, day: Day) -> None:
        self._day = day
        number = len(day.prompts)
        self._left = day.completions.copy()
        self._begun_s = np.zeros(number)
        self._first_s = np.full(number, np.inf)
        self._ended_s = np.full(number, np.inf)
        self._running = np.zeros(0, dtype=np.int64)
        self._next = self._arrived = 0
        self._tokens = 0.0
        self.busy = 0.0

    def second(self, now_s: int, workers: int) -> Moment:
        """Let one second pass."""
        arrived = self._arrived + int(self._day.counts[now_s])
        self._begun_s[self._arrived : arrived] = now_s
        self._arrived = arrived
        room = GATEWAYS * MOST_SEQUENCES - len(self._running)
        admitted = np.arange(self._next, min(self._next + room, self._arrived))
        self._next += len(admitted)
        batch = (len(self._running) + len(admitted)) / GATEWAYS
        takes_s, compute_s = step_s(batch, workers, self.busy)
        # Prefill takes its share of the gateways' time first.
        prefill_s = self._day.prompts[admitted].sum() / PREFILL_TOKENS_S / GATEWAYS
        steps = max(1.0 - prefill_s, 0.1) / takes_s
        self._first_s[admitted] = now_s + prefill_s + takes_s
        self._running = np.concatenate([self._running, admitted])
        self._left[self._running] -= steps
        done = self._left[self._running] <= 0
        self._ended_s[self._running[done]] = now_s + 1
        computes = min(GATEWAYS * steps * compute_s, 1.0) if batch else 0.0
        self.busy = 0.5 * self.busy + 0.5 * computes
        self._tokens += steps * len(self._running) + self._day.prompts[admitted].sum()
        self._running = self._running[~done]
        return Moment(
            serving=workers,
            busy=self.busy,
            queue_age_s=(takes_s - FIXED_S - LAYERS * LINK_S - compute_s) / LAYERS,
            waiting_share=1 - FIXED_S / takes_s,
            waiting=self._arrived - self._next,
            tokens=int(self._tokens),
        )

    def late(self) -> float:
        """Return the share of requests that were late, or did not end."""
        number = self._arrived
        per_token_s = (self._ended_s - self._first_s)[:number] / self._day.completions[:number]
        to_first_s = (self._first_s - self._begun_s)[:number]
        return float(np.mean((per_token_s > LATE_TOKEN_S) | (to_first_s > LATE_FIRST_S)))


def run(day: Day, decide: Scaler, begin: int) -> Outcome:
    """Run a day; workers that are wanted serve after `START_S`, others leave at once."""
    fleet, wanted, serving = Fleet(day), begin, begin
    coming: list[int] = []
    worker_s, most, changes = 0, begin, 0
    for now_s in range(len(day.counts)):
        while coming and coming[0] <= now_s:
            coming.pop(0)
            serving += 1
        seen = fleet.second(now_s, serving)
        if now_s % PERIOD_S == 0:
            after = decide(seen, wanted, float(now_s))
            changes += after != wanted
            coming += [int(now_s + START_S)] * max(after - wanted, 0)
            for _ in range(max(wanted - after, 0)):
                if coming:
                    coming.pop()
                else:
                    serving -= 1
            wanted = after
        worker_s += wanted  # a node is paid for from when it is asked for
        most = max(most, wanted)
    return Outcome(worker_s / 3600, fleet.late(), most, changes)


def static_peak(day: Day, most_late: float) -> tuple[int, Outcome]:
    """Return the least number of workers, the same all day, with which no more are late."""
    low, high = FEWEST, MOST
    while low < high:
        middle = (low + high) // 2
        if run(day, fixed(middle), middle).late <= most_late:
            high = middle
        else:
            low = middle + 1
    return high, run(day, fixed(high), high)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--most-late", type=float, default=0.001)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scaling = ExpertScaling(min=FEWEST, max=MOST, down_s=600.0, queue_s=0.0005)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        day = draw_day(seed)
        number, static = static_peak(day, options.most_late)
        found = {
            "static peak": static,
            "queue length": run(day, by_queue(scaling), number),
            **{
                f"this policy, target {100 * target:.0f} %": run(
                    day, policy(replace(scaling, target=target)), number
                )
                for target in options.targets
            },
        }
        for name, outcome in found.items():
            rows.append(
                {
                    "seed": seed,
                    "requests": int(day.counts.sum()),
                    "way": name,
                    "worker_hours": round(outcome.worker_hours),
                    "of_static": round(outcome.worker_hours / static.worker_hours, 2),
                    "late_percent": round(100 * outcome.late, 2),
                    "most": outcome.most,
                    "changes": outcome.changes,
                }
            )
            print(orjson.dumps(rows[-1]).decode(), flush=True)
    report = {
        "machine": {"python": platform.python_version(), "numpy": np.__version__},
        "model": "step times are modelled, decisions are the product's",
        "rows": rows,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()
