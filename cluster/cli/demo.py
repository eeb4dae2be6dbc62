"""`expertmesh demo`: every role on this machine, one question, who computed what, and an end."""

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.cli.client import Server, channel_to
from cluster.cli.serve import Progress, Signals, Stop
from cluster.config import ClusterConfig
from cluster.control.status import ClusterStatus
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from cluster.serving import serving
from workers.clock import SystemClock
from workers.errors import ExpertmeshError
from workers.placement import Role
from workers.types import GatewayStats, WorkerStats

_QUESTION = "What is the capital of France?"
_DEADLINE_S = 120.0
_CLIENT_DEADLINE_S = 300.0
_COUNTERS_SETTLE_S = 1.0


def demo_command(config: ClusterConfig, client: Path | None) -> None:
    """Start a cluster, ask it a question, run a client program against it, and end it.

    Raises:
        ExpertmeshError: The cluster did not come up, or the client program failed.
    """
    console = Console()
    signals = Signals()
    console.print(
        f"starting front doors: {config.front_doors.count}; gateways: {config.gateways.count}, of "
        f"{config.gateways.tensor_parallel} ranks each; expert workers: {config.experts.workers}"
    )
    progress = Progress(Console(stderr=True))
    try:
        with serving(config, clock=SystemClock(), wait=signals.wait, progress=progress) as cluster:
            console.rule(f"serving at {cluster.endpoint}")
            _ask(console, cluster.endpoint, _QUESTION)
            if client is not None:
                console.rule(client.name)
                _run(client, cluster.endpoint)
            signals.wait(config.control.pulse_s + _COUNTERS_SETTLE_S)
            console.rule("who computed what")
            console.print(_table(cluster.status()))
    except Stop:
        console.print("interrupted", style="dim")
    console.print("ended cleanly", style="dim")


def _ask(console: Console, endpoint: str, question: str) -> None:
    console.print(f"[bold]user:[/bold] {question}")
    console.print("[bold]model:[/bold] ", end="")
    request = pb.ChatRequest(
        messages=[pb.Message(role="user", content=question)],
        enable_thinking=False,
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(max_tokens=64),
    )
    tokens = messages = 0
    with channel_to(Server(address=endpoint)) as channel:
        started_s = time.perf_counter()
        first_s = started_s
        for response in InferenceServiceStub(channel).Chat(request, timeout=_DEADLINE_S):
            sys.stdout.write(response.content)
            sys.stdout.flush()
            if response.token_ids:
                first_s = first_s if tokens else time.perf_counter()
                tokens += len(response.token_ids)
                messages += 1
    spent_s = time.perf_counter() - first_s
    rate = f"{(tokens - 1) / spent_s:.1f} tokens/s" if tokens > 1 else "one token"
    console.print(
        f"\n{tokens} tokens in {messages} messages, the first after "
        f"{1000 * (first_s - started_s):.0f} ms, then {rate}",
        style="dim", highlight=False,
    )  # fmt: skip


def _run(client: Path, endpoint: str) -> None:
    ended = subprocess.run(  # noqa: S603 - the user's own program
        [sys.executable, str(client), "--server", endpoint],
        timeout=_CLIENT_DEADLINE_S, check=False,
    )  # fmt: skip
    if ended.returncode:
        raise ExpertmeshError(f"{client} ended with status {ended.returncode}")


def _table(status: ClusterStatus) -> Table:
    table = Table()
    table.add_column("member", no_wrap=True)
    for column in ("pid", "rows received", "(row, expert) pairs", "calls"):
        table.add_column(column, justify="right")
    sent: dict[str, int] = {}
    for member in status.members:
        for pulse in member.pulses:
            if isinstance(pulse.stats, GatewayStats):
                for worker, rows in pulse.stats.rows_by_worker.items():
                    sent[worker] = sent.get(worker, 0) + rows
    for member in sorted(status.members, key=lambda m: m.member.id):
        if member.member.role is not Role.EXPERT_WORKER:
            continue
        stats = next((p.stats for p in member.pulses if isinstance(p.stats, WorkerStats)), None)
        cells = (stats.rows, stats.pairs, stats.calls) if stats else ("-", "-", "-")
        table.add_row(str(member.member.id), str(member.member.pid), *(str(cell) for cell in cells))
    for worker in sorted(set(sent) - {str(m.member.id) for m in status.members}):
        table.add_row(worker, "-", str(sent[worker]), "-", "-")
    return table
