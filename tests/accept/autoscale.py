"""Load triples and falls again: expert workers and their nodes come and go, and no client can tell.

    python -m tests.accept.autoscale [--rate 0.2] [--expert-ms 0.5] [--json FILE] [--plot FILE]

Ray's own autoscaler (v2) runs on this machine and brings a raylet for each node. `expertmesh apply`
starts the cluster; requests come at random times, three times as many in the middle. Every sequence
is replayed through the experts in one process. The same requests go to a cluster that has as many
workers as the peak took from the start, for the times to the first token there.

Workers that share this machine's cores do not get faster by their number. `--expert-ms` has each
expert of a batch take that long, in which the worker waits without a core, as if it had an
accelerator (`tests/injection/pace.py`); 0 leaves them as they are.
"""

import argparse
import asyncio
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cluster.chaos.doors import Doors
from cluster.chaos.history import Answer
from cluster.chaos.load import Load, draw_ask
from cluster.chaos.run import ChaosOptions, Run, report_of
from cluster.chaos.stalls import percentile
from cluster.demo.path import demo_model_path
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from cluster.pb.expertmesh.v1 import inference_pb2
from tests.cluster.harness_apply import Site, site
from tests.injection.into import environment_of
from workers.clock import SystemClock

LOOK_S = 0.25
TIMES_STATIC = 2.0
NODE_TYPES = {
    "expert": {"expert_slot": 1},
    "gateway": {"gateway": 1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When the load is what: `rate` requests a second, three times that in the middle.

    For `quiet_s` at the end none come, so that the last thing seen is no chance burst.
    """

    rate: float
    calm_s: float
    peak_s: float
    after_s: float
    quiet_s: float = 0.0
    seed: int

    @property
    def loaded_s(self) -> float:
        return self.calm_s + self.peak_s + self.after_s

    @property
    def length_s(self) -> float:
        return self.loaded_s + self.quiet_s

    def rate_at(self, at_s: float) -> float:
        peaks = self.calm_s <= at_s < self.calm_s + self.peak_s
        return 3 * self.rate if peaks else self.rate

    def arrivals_s(self) -> list[float]:
        """Return the times at which requests come: the same for the same seed."""
        draw, at_s, times = random.Random(f"{self.seed}/arrivals"), 0.0, []
        while at_s < self.loaded_s:
            at_s += draw.expovariate(3 * self.rate)
            if draw.random() < self.rate_at(at_s) / (3 * self.rate):
                times.append(at_s)
        return times


class OpenLoad(Load):
    """Sends each request at its time, however many are under way."""

    async def run_plan(self, plan: Plan) -> float:
        """Send all of them and wait for their answers; returns when the plan began."""
        begun_s = self._clock.now_s()
        tasks = []
        for number, at_s in enumerate(plan.arrivals_s()):
            await asyncio.sleep(max(begun_s + at_s - self._clock.now_s(), 0.0))
            ask = draw_ask(self._seed, number, self._vocabulary_size)
            answer = Answer(ask, self._clock.now_s())
            self.answers.append(answer)
            tasks.append(asyncio.create_task(self._follow(answer)))
        await asyncio.sleep(max(begun_s + plan.length_s - self._clock.now_s(), 0.0))
        await asyncio.gather(*tasks)
        return begun_s


@dataclass(slots=True)
class Seen:
    """What was looked at while the load ran; times from the beginning of the plan."""

    answers: list[Answer] = field(default_factory=list)
    begun_s: float = 0.0
    samples: list[dict[str, float]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    gateways: set[str] = field(default_factory=set)
    first_row_s: dict[str, float] = field(default_factory=dict)  # of each worker

    def first_tokens_s(self, start_s: float, end_s: float) -> list[float]:
        """Return the times to the first token of the requests sent between these times, sorted."""
        return sorted(
            min(arrivals[0].at_s for arrivals in answer.arrivals.values()) - answer.sent_s
            for answer in self.answers
            if start_s <= answer.sent_s - self.begun_s < end_s and answer.arrivals
        )


async def watch(doors: Doors, seen: Seen) -> None:
    """Look at the cluster until cancelled."""
    clock = SystemClock()
    while True:
        await asyncio.sleep(LOOK_S)
        reply = await doors.pick().cluster.GetStatus(pb.GetStatusRequest(), timeout=10)
        status, now_s = reply.status, clock.now_s()
        workers = [m for m in status.members if m.HasField("worker_stats")]
        for worker in workers:
            if worker.worker_stats.rows:
                seen.first_row_s.setdefault(f"{worker.name}.{worker.incarnation}", now_s)
        members = status.view.members
        experts = [m for m in members if m.role == pb.ROLE_EXPERT_WORKER]
        seen.gateways |= {f"{m.name}.{m.incarnation}" for m in members if m.role == pb.ROLE_GATEWAY}
        (pool,) = (p for p in status.pools if p.role == pb.ROLE_EXPERT_WORKER)
        gateways = [m.gateway_stats for m in status.members if m.HasField("gateway_stats")]
        seen.samples.append(
            {
                "at_s": now_s,
                "wanted": pool.wanted,
                "serving": pool.serving,
                "nodes": len({m.node for m in experts if m.node}),
                "busy": sum(w.busy_share for w in workers) / max(len(workers), 1),
                "queue_age_s": max((w.queue_age_s for w in workers), default=0.0),
                "waiting_share": max((m.waiting_share for m in status.members), default=0.0),
                "running": sum(g.running + g.waiting for g in gateways),
            }
        )
        for change in status.scale_changes:
            at_s = now_s - change.age_s
            is_new = all(
                abs(at_s - c["at_s"]) > 2.0 or c["after"] != change.after for c in seen.changes
            )
            if is_new:  # its age is told, not its time
                seen.changes.append(
                    {"at_s": at_s, "before": change.before, "after": change.after,
                     "why": change.why}
                )  # fmt: skip
                print(f"{change.before} -> {change.after}: {change.why}", flush=True)


async def load_and_watch(server: str, plan: Plan) -> Seen:
    seen = Seen()
    doors = Doors(server, seed=plan.seed)
    async with doors.open():
        models = await doors.pick().inference.ListModels(
            inference_pb2.ListModelsRequest(), timeout=10
        )
        load = OpenLoad(
            doors,
            concurrency=0,
            seed=plan.seed,
            vocabulary_size=models.models[0].vocabulary_size,
            clock=SystemClock(),
        )
        watching = asyncio.create_task(watch(doors, seen))
        seen.begun_s = await load.run_plan(plan)
        watching.cancel()
        seen.answers = load.answers
        for entry in [*seen.samples, *seen.changes]:
            entry["at_s"] -= seen.begun_s
        seen.first_row_s = {w: at - seen.begun_s for w, at in seen.first_row_s.items()}
        return seen


def node_types(most: int) -> dict[str, dict]:
    """Return what Ray's autoscaler may bring: nodes for one worker, and for one gateway."""
    return {
        name: {
            "resources": {"CPU": 0, **resources},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most if name == "expert" else 2,
        }
        for name, resources in NODE_TYPES.items()
    }


def run(options: argparse.Namespace, plan: Plan, *, workers: int, follows_load: bool) -> Seen:
    """Apply a cluster and load it."""
    changes = {
        "gateways.resources": {"gateway": 1},
        "experts.resources": {"expert_slot": 1},
        "front_doors.resources": {"frontdoor": 1},
        "experts.workers": workers,
        "experts.min": options.fewest,
        "experts.floor": 2,
        "autoscaler.experts": {
            "min": options.fewest,
            "max": options.most if follows_load else 0,
            "target": options.target,
            "queue_s": options.queue_s,
            "down_s": options.down_s,
        },
        "autoscaler.ahead_s": 6.0,
    }
    types = node_types(options.most)
    environment = {}
    if options.expert_ms:
        environment = environment_of(
            "workers.model.experts",
            "tests.injection.pace:slow_down",
            EXPERT_MS=str(options.expert_ms),
        )
    with site(
        resources={"frontdoor": 4}, node_types=types, environment=environment, **changes
    ) as made:
        applied(made)
        try:
            return asyncio.run(load_and_watch(made.endpoint, plan))
        finally:
            made.down()


def applied(made: Site) -> None:
    ended = made.apply()
    assert ended.returncode == 0, ended.stderr[-4000:]


def summary_ms(times_s: Sequence[float]) -> dict[str, float]:
    return {
        "count": len(times_s),
        **{f"p{at}": round(1000 * percentile(times_s, at), 1) for at in (50, 90, 99, 100)},
    }


def judge(options: argparse.Namespace, plan: Plan, scaled: Seen, static: Seen) -> dict[str, Any]:
    """Return the report; `passed` says whether all that is claimed was seen."""
    chaos = ChaosOptions(counts={}, seed=plan.seed)
    judged = {
        name: report_of(Run(seen.answers, [], Counter()), chaos, model_dir)
        for name, seen, model_dir in (
            ("scaled", scaled, demo_model_path()),
            ("static", static, None),  # for its times only
        )
    }
    peak = (plan.calm_s, plan.calm_s + plan.peak_s)
    up = [c for c in scaled.changes if c["after"] > c["before"] and peak[0] <= c["at_s"] < peak[1]]
    newcomers = sorted(
        at for at in scaled.first_row_s.values() if up and up[0]["at_s"] < at < peak[1]
    )
    settled_s = newcomers[-1] if newcomers else peak[1]
    first_tokens = {
        name: {
            "calm": summary_ms(seen.first_tokens_s(0, plan.calm_s)),
            "scale_up": summary_ms(seen.first_tokens_s(plan.calm_s, settled_s)),
            "peak": summary_ms(seen.first_tokens_s(*peak)),
        }
        for name, seen in (("scaled", scaled), ("static", static))
    }
    most = max(s["serving"] for s in scaled.samples)
    ratio = first_tokens["scaled"]["scale_up"]["p99"] / max(
        first_tokens["static"]["peak"]["p99"], 1e-9
    )
    checks = {
        "nothing lost, refused, short or out of order": not judged["scaled"]["num_problems"],
        "tokens right": judged["scaled"]["passed"],
        "workers and nodes came": most > options.fewest
        and max(s["nodes"] for s in scaled.samples) >= most,
        "the new ones were used": bool(newcomers),
        "they left again, and their nodes": scaled.samples[-1]["serving"] == options.fewest
        and scaled.samples[-1]["nodes"] == options.fewest,
        "one gateway, never another": len(scaled.gateways) == 1,
        "time to first token p99 while growing at most twice that of the static peak": ratio
        <= TIMES_STATIC,
    }
    return {
        "options": {k: str(v) for k, v in vars(options).items()},
        "machine": judged["scaled"]["machine"],
        "requests": len(scaled.answers),
        "judged": {
            name: {k: j[k] for k in ("sequences", "tokens", "num_problems", "problems", "replay")}
            for name, j in judged.items()
        },
        "changes": scaled.changes,
        "most_workers": most,
        "trigger_to_first_row_s": round(newcomers[0] - up[0]["at_s"], 2)
        if newcomers and up
        else None,
        "load_to_first_row_s": round(newcomers[0] - plan.calm_s, 2) if newcomers else None,
        "first_token_ms": first_tokens,
        "first_token_p99_ratio": round(ratio, 2),
        "worker_seconds": {
            name: round(worker_seconds(seen), 0)
            for name, seen in (("scaled", scaled), ("static", static))
        },
        "checks": checks,
        "passed": all(checks.values()),
        "samples": scaled.samples,
    }


def worker_seconds(seen: Seen) -> float:
    """Return for how long all workers together were wanted."""
    pairs = zip(seen.samples, seen.samples[1:], strict=False)
    return sum(a["wanted"] * (b["at_s"] - a["at_s"]) for a, b in pairs)


def plot(path: Path, plan: Plan, scaled: Seen, static: Seen) -> None:
    """Draw load, workers, queue age and times to the first token over time."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True)
    times = [s["at_s"] for s in scaled.samples]
    axes[0].step([0, plan.calm_s, plan.calm_s + plan.peak_s, plan.loaded_s, plan.length_s],
                 [plan.rate, 3 * plan.rate, plan.rate, 0, 0], where="post")  # fmt: skip
    axes[0].set_ylabel("requests/s")
    for name in ("wanted", "serving", "nodes"):
        axes[1].step(times, [s[name] for s in scaled.samples], where="post", label=name)
    axes[1].set_ylabel("expert workers")
    axes[1].legend()
    axes[2].plot(times, [1000 * s["queue_age_s"] for s in scaled.samples], label="queue age, ms")
    axes[2].plot(times, [100 * s["busy"] for s in scaled.samples], label="busy, %")
    axes[2].legend()
    for name, seen in (("scaled", scaled), ("static peak", static)):
        sent = [a for a in seen.answers if a.arrivals]
        axes[3].scatter(
            [a.sent_s - seen.begun_s for a in sent],
            [1000 * (min(v[0].at_s for v in a.arrivals.values()) - a.sent_s) for a in sent],
            s=6,
            label=name,
        )
    axes[3].set_ylabel("first token, ms")
    axes[3].set_xlabel("seconds")
    axes[3].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--calm-s", type=float, default=45)
    parser.add_argument("--peak-s", type=float, default=120)
    parser.add_argument("--after-s", type=float, default=60)
    parser.add_argument("--quiet-s", type=float, default=120)
    parser.add_argument("--fewest", type=int, default=2)
    parser.add_argument("--most", type=int, default=5)
    parser.add_argument("--expert-ms", type=float, default=0.5)
    parser.add_argument("--target", type=float, default=0.3)
    parser.add_argument("--queue-s", type=float, default=0.5)
    parser.add_argument("--down-s", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    plan = Plan(
        rate=options.rate,
        calm_s=options.calm_s,
        peak_s=options.peak_s,
        after_s=options.after_s,
        quiet_s=options.quiet_s,
        seed=options.seed,
    )
    print(f"seed {options.seed}; {len(plan.arrivals_s())} requests", flush=True)
    scaled = run(options, plan, workers=options.fewest, follows_load=True)
    most = int(max(s["serving"] for s in scaled.samples))
    calm = Plan(rate=plan.rate, calm_s=plan.calm_s, peak_s=plan.peak_s, after_s=5, seed=plan.seed)
    static = run(options, calm, workers=max(most, options.fewest), follows_load=False)
    report = judge(options, plan, scaled, static)
    shown = {k: v for k, v in report.items() if k != "samples"}
    print(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    if options.plot:
        plot(options.plot, plan, scaled, static)
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
