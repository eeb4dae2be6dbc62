"""One run: the load, the faults, and the report of what clients saw."""

import asyncio
import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cluster.chaos.doors import Connect, Doors
from cluster.chaos.faults import BREAKS_STREAMS, Done, Fault, Saboteur, draw_faults
from cluster.chaos.history import Answer, problems_of
from cluster.chaos.load import Load
from cluster.chaos.stalls import percentile, stalls_by_kind
from cluster.chaos.verdict import replays
from cluster.pb.expertmesh.v1 import cluster_pb2, inference_pb2
from workers.clock import Clock
from workers.errors import RefusedError, UnavailableError
from workers.types import RECOVERY_BOUNDS_S

_WARM_UP_S = 3.0
_SHOWN = 20
_FEW_EXPLAINED = 20  # tokens: the rest of one sequence after a near-tie
_MOST_EXPLAINED = 2e-3  # of all tokens; where all went well it was 1 in 10,000

Script = Callable[[Saboteur], Any]  # a coroutine function that harms the cluster


class AnyLoad(Protocol):
    """What keeps requests under way while a cluster is harmed."""

    @property
    def answers(self) -> list[Answer]:
        """What came for each request that was sent, also of those under way."""
        ...

    async def run(self) -> None:
        """Send requests until `stop`, and let the last ones finish."""
        ...

    def stop(self) -> None:
        """Send no further requests."""
        ...


# Given the front doors and how many token ids there are.
LoadMaker = Callable[[Doors, int], AnyLoad]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    """What is done to a cluster, and under which load.

    `breaks_streams`: what a script does takes front doors away, so that clients have to come back.
    """

    counts: dict[Fault, int]
    concurrency: int = 16
    seed: int = 0
    breaks_streams: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What clients saw, and what was done meanwhile.

    `recoveries` counts layers by how long they took once a loss was noticed; see `GatewayStats`.
    `longest_deadline_s` is that of a call whose worker was late, of gateways that live at the end.
    """

    answers: list[Answer]
    done: list[Done]
    recoveries: Counter[int]
    longest_deadline_s: float = 0.0


async def run_chaos(
    server: str,
    options: ChaosOptions,
    *,
    clock: Clock,
    progress: Callable[[Done], None],
    connect: Connect | None = None,
) -> Run:
    """Run the load, do the faults, let the last requests finish.

    Raises RefusedError when the cluster was not started with --allow-chaos, and UnavailableError
    when it is not whole again after a fault.
    """
    faults = draw_faults(options.counts, options.seed)
    return await run_script(
        server,
        options,
        lambda saboteur: saboteur.run(faults),
        clock=clock,
        progress=progress,
        connect=connect,
    )


async def run_script(
    server: str,
    options: ChaosOptions,
    script: Script,
    *,
    clock: Clock,
    progress: Callable[[Done], None] = lambda _done: None,
    connect: Connect | None = None,
    make_load: LoadMaker | None = None,
) -> Run:
    """Run the load beside a script of faults; see `run_chaos`.

    `connect` opens a channel to a front door at HOST:PORT; a cleartext one when it is None. The
    load is that of `load.py` unless `make_load` makes another one.
    """
    doors = Doors(
        server, seed=options.seed, with_cables=Fault.CUT in options.counts, connect=connect
    )
    async with doors.open():
        saboteur = Saboteur(doors, seed=options.seed, clock=clock, progress=progress)
        status = await saboteur.status()
        if status is None:
            raise UnavailableError(f"{server} has no controller that answers")
        if not status.allows_chaos:
            raise RefusedError(
                f"the cluster at {server} does not allow chaos: start it with --allow-chaos, "
                "and never where somebody's requests run"
            )
        models = await doors.pick().inference.ListModels(
            inference_pb2.ListModelsRequest(), timeout=10
        )
        vocabulary_size = models.models[0].vocabulary_size
        load: AnyLoad
        if make_load is not None:
            load = make_load(doors, vocabulary_size)
        else:
            load = Load(
                doors,
                concurrency=options.concurrency,
                seed=options.seed,
                vocabulary_size=vocabulary_size,
                clock=clock,
            )
        running = asyncio.create_task(load.run())
        try:
            await asyncio.sleep(_WARM_UP_S)
            await script(saboteur)
            await asyncio.sleep(_WARM_UP_S)
            after = await saboteur.whole()
        finally:
            load.stop()
            await running
        recoveries = _recoveries(after) - _recoveries(status)
        longest_s = max((m.gateway_stats.longest_deadline_s for m in after.members), default=0.0)
        return Run(load.answers, saboteur.done, recoveries, longest_s)


def _recoveries(status: cluster_pb2.ClusterStatus) -> Counter[int]:
    """Return how many layers of all gateways fell into each class of recovery time."""
    return sum(
        (Counter(dict(enumerate(m.gateway_stats.recoveries))) for m in status.members), Counter()
    )


def report_of(
    run: Run, options: ChaosOptions, model_dir: Path | None, *, bit_stable: bool = False
) -> dict[str, Any]:
    """Judge a run; `passed` says whether no client could tell that anything happened.

    Without `model_dir` tokens are not replayed, and the report says so.
    """
    problems = problems_of(run.answers)
    report: dict[str, Any] = {
        "machine": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "seed": options.seed,
        "concurrency": options.concurrency,
        "faults": dict(Counter(done.window.kind for done in run.done)),
        "requests": len(run.answers),
        "sequences": sum(a.ask.num_sequences for a in run.answers),
        "resumed_calls": sum(len(a.breaks) for a in run.answers),
        "tokens": sum(len(a.token_ids(s)) for a in run.answers for s in a.arrivals),
        "problems": {name: list(found)[:_SHOWN] for name, found in asdict(problems).items()},
        "num_problems": problems.count,
        "stalls_ms": {s.kind: _summary(s.sequences_s) for s in _stalls(run)},
        "worst_stall_of_a_fault_ms": {s.kind: _summary(s.worst_s) for s in _stalls(run)},
        "whole_after_s": _whole_after(run.done),
        "longest_deadline_s": run.longest_deadline_s,
        "recoveries_s": {
            "at_most": [*RECOVERY_BOUNDS_S, None],
            "layers": [run.recoveries[i] for i in range(len(RECOVERY_BOUNDS_S) + 1)],
        },
    }
    wrong = explained = replayed = 0
    if model_dir is not None:
        for verdict in replays(model_dir, run.answers, bit_stable=bit_stable):
            replayed += 1
            explained += sum(m.is_explained for m in verdict.mismatches)
            wrong += not verdict.is_right
    report["replay"] = {
        "sequences": replayed, "wrong": wrong, "explained_mismatches": explained,
        "bit_stable": bit_stable,
    }  # fmt: skip
    # Whatever else happens in the cluster, no client's stream breaks.
    may_break = options.breaks_streams or not BREAKS_STREAMS.isdisjoint(options.counts)
    is_quiet = may_break or not report["resumed_calls"]
    # A near-tie in a gate explains all that follows it: what is wrong for long shows by its number.
    wrong += explained > max(_FEW_EXPLAINED, _MOST_EXPLAINED * report["tokens"])
    is_right = not problems.count and not wrong and bool(replayed or model_dir is None)
    report["passed"] = is_quiet and is_right
    return report


def _stalls(run: Run) -> Sequence[Any]:
    return stalls_by_kind(run.answers, [done.window for done in run.done])


def _summary(ordered_s: Sequence[float]) -> dict[str, float]:
    return {
        "count": len(ordered_s),
        "p50": 1000 * percentile(ordered_s, 50),
        "p99": 1000 * percentile(ordered_s, 99),
        "max": 1000 * percentile(ordered_s, 100),
    }


def _whole_after(done: Sequence[Done]) -> dict[str, dict[str, float]]:
    """Return, for each kind, how long the cluster took to be whole again, in seconds."""
    kinds = dict.fromkeys(d.window.kind for d in done)
    ordered = {k: sorted(d.whole_after_s for d in done if d.window.kind == k) for k in kinds}
    return {
        kind: {"p50": percentile(values, 50), "max": percentile(values, 100)}
        for kind, values in ordered.items()
    }
