"""`expertmesh bench`: load over gRPC, in a closed loop (so many at once) or an open one."""

import asyncio
import platform
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import orjson
from rich.console import Console
from rich.table import Table

from cluster.cli.client import Server, channel_to
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from workers.errors import ExpertmeshError

PERCENTILES = (50, 90, 99)
_DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The load: `rate_per_s` None is a closed loop of `concurrency` clients."""

    requests: int
    concurrency: int
    rate_per_s: float | None
    prompt_tokens: int
    output_tokens: int
    seed: int


@dataclass(slots=True)
class Outcome:
    """One request: when it was sent, when each message with tokens came, in seconds."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""


def bench_command(server: Server, options: LoadOptions, report_path: Path | None) -> None:
    """Run the load, print a table and write the report."""
    with channel_to(server) as channel:
        model = (
            InferenceServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=10).models[0]
        )
    started_s = time.perf_counter()
    outcomes = asyncio.run(_load(server, options, model.vocabulary_size))
    report = summarize(outcomes, time.perf_counter() - started_s)
    report |= {
        "load": asdict(options),
        "model": model.name,
        "client": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "grpcio": grpc.__version__,
        },
    }
    Console().print(_table(report))
    if not report["completed"]:
        raise ExpertmeshError(f"no request was completed; the first ended with {outcomes[0].error}")
    if report_path is not None:
        report_path.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))


def summarize(outcomes: list[Outcome], wall_s: float) -> dict[str, Any]:
    """Return the report of a load: latencies in seconds, rates per second, errors by status."""
    good = [o for o in outcomes if not o.error]
    first = [o.arrivals_s[0] - o.sent_s for o in good if o.arrivals_s]
    per_token = [
        (o.arrivals_s[-1] - o.arrivals_s[0]) / (o.tokens - 1)
        for o in good
        if o.tokens > 1 and len(o.arrivals_s) > 1
    ]
    whole = [o.arrivals_s[-1] - o.sent_s for o in good if o.arrivals_s]
    return {
        "wall_s": wall_s,
        "completed": len(good),
        "errors": dict(Counter(o.error.partition(":")[0] for o in outcomes if o.error)),
        "tokens_per_s": sum(o.tokens for o in good) / wall_s,
        "requests_per_s": len(good) / wall_s,
        "time_to_first_token_s": percentiles(first),
        "time_per_output_token_s": percentiles(per_token),
        "request_s": percentiles(whole),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Return p50, p90, p99 and max by nearest rank; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
    return {**ranks, "max": ordered[-1]}


async def _load(server: Server, options: LoadOptions, vocabulary_size: int) -> list[Outcome]:
    async with server.aio_channel() as channel:
        stub = InferenceServiceStub(channel)

        async def one(number: int) -> Outcome:
            draw = random.Random(f"{options.seed}/{number}")  # noqa: S311 - a load, not a secret
            ids = [draw.randrange(vocabulary_size) for _ in range(options.prompt_tokens)]
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=ids),
                sampling=pb.Sampling(seed=number),
                stopping=pb.Stopping(max_tokens=options.output_tokens, ignore_eos=True),
            )
            return await _measure(stub, request)

        if options.rate_per_s is None:
            return await _closed_loop(one, options)
        return await _open_loop(one, options, options.rate_per_s)


async def _measure(stub: Any, request: pb.GenerateRequest) -> Outcome:  # noqa: ANN401
    outcome = Outcome(time.perf_counter())
    try:
        async for response in stub.Generate(request, timeout=_DEADLINE_S):
            if response.token_ids:
                outcome.arrivals_s.append(time.perf_counter())
                outcome.tokens += len(response.token_ids)
    except grpc.aio.AioRpcError as error:
        outcome.error = f"{error.code().name}: {error.details()}"
    return outcome


_One = Callable[[int], Awaitable[Outcome]]


async def _closed_loop(one: _One, options: LoadOptions) -> list[Outcome]:
    numbers = iter(range(options.requests))

    async def client() -> list[Outcome]:
        return [await one(number) for number in numbers]

    clients = await asyncio.gather(*(client() for _ in range(options.concurrency)))
    return [outcome for outcomes in clients for outcome in outcomes]


async def _open_loop(one: _One, options: LoadOptions, rate_per_s: float) -> list[Outcome]:
    draw = random.Random(options.seed)  # noqa: S311 - a load, not a secret

    async def after(delay_s: float, number: int) -> Outcome:
        await asyncio.sleep(delay_s)
        return await one(number)

    delay_s, waiting = 0.0, []
    for number in range(options.requests):
        delay_s += draw.expovariate(rate_per_s)
        waiting.append(after(delay_s, number))
    return list(await asyncio.gather(*waiting))


def _table(report: dict[str, Any]) -> Table:
    title = (
        f"{report['completed']} completed, errors {report['errors'] or 'none'}, "
        f"{report['tokens_per_s']:.1f} tokens/s, {report['requests_per_s']:.2f} requests/s"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("milliseconds")
    for column in (*(f"p{p}" for p in PERCENTILES), "max"):
        table.add_column(column, justify="right")
    for name in ("time_to_first_token_s", "time_per_output_token_s", "request_s"):
        values = [f"{1000 * v:.1f}" for v in report[name].values()] or ["-"] * 4
        table.add_row(name.removesuffix("_s").replace("_", " "), *values)
    return table
