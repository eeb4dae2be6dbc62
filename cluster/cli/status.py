"""`expertmesh status`: the View of a cluster, as a table or as JSON, once or live."""

import sys
import time
from collections.abc import Callable
from typing import Any

import grpc
import orjson
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cli.client import Server, channel_to
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from cluster.pb.expertmesh.v1.cluster_pb2_grpc import ClusterServiceStub
from workers.clock import SystemClock

_DEADLINE_S = 10.0
_CONTROLLER_DEADLINE_S = 3.0
_EVERY_S = 1.0
_NUM_CHANGES = 3


def status_command(server: Server, *, as_json: bool) -> None:
    """Print the members of the cluster behind a front door, and how their numbers follow load.

    The members are known at the front door; the rest only to the controller, which may be away.
    """
    status, away = pb.ClusterStatus(), ""
    with channel_to(server) as channel:
        stub = ClusterServiceStub(channel)
        view = stub.GetView(pb.GetViewRequest(), timeout=_DEADLINE_S).view
        try:
            request = pb.GetStatusRequest()
            status = stub.GetStatus(request, timeout=_CONTROLLER_DEADLINE_S).status
        except grpc.RpcError as error:
            away = f"the controller does not answer: {error.details()}"
    if as_json:
        tree = _tree(view) | {"controller": away or "answers"}
        if not away:
            told = _tree(status)
            tree |= {"health": told.pop("members")}
            tree |= {name: value for name, value in told.items() if name != "view"}
        sys.stdout.write(orjson.dumps(tree, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        console = Console()
        console.print(_table(view))
        for reason in status.reasons:
            console.print(reason, style="red", markup=False, highlight=False)
        for line in filter(None, [*_scales(status), away]):
            console.print(line, markup=False, highlight=False)


def _tree(message: Message) -> dict[str, Any]:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _table(view: pb.View) -> Table:
    missing = view.coverage.num_uncovered
    coverage = f"{missing} experts uncovered" if missing else "all experts covered"
    table = Table(
        title=f"term {view.term}, version {view.version}: {coverage}",
        title_justify="left",
        box=SIMPLE,
    )
    has_cells = any(member.cell for member in view.members)
    cell = ["cell"] if has_cells else []
    for column in ("id", *cell, "state", "pid", "node", "slots", "endpoint"):
        table.add_column(column, no_wrap=column in {"id", "endpoint"})
    for member in view.members:
        slots = f"{member.slots_used}/{member.num_slots}" if member.num_slots else ""
        table.add_row(
            f"{member.name}.{member.incarnation}",
            *([_cell_of(member)] if has_cells else []),
            pb.MemberState.Name(member.state).removeprefix("MEMBER_STATE_").lower(),
            str(member.pid or ""),
            member.node[:8],
            slots,
            member.endpoint,
        )
    return table


def _cell_of(member: pb.Member) -> str:
    if member.role == pb.ROLE_FRONT_DOOR:
        return ""
    return str(member.cell) if member.cell >= 0 else "any"


def watch_command(server: Server, *, num_rounds: int | None = None) -> None:
    """Show every member's state, load and stalls, again each second, until interrupted.

    In place on a terminal; elsewhere one after the other. `num_rounds` limits how often.
    """
    console = Console()
    if not console.is_terminal:
        _watch(server, console.print, num_rounds)
        return
    with Live(console=console, auto_refresh=False) as live:
        _watch(server, lambda table: live.update(table, refresh=True), num_rounds)


def _watch(server: Server, show: Callable[[Group], None], num_rounds: int | None) -> None:
    rates, clock = Rates(), SystemClock()
    with channel_to(server) as channel:
        stub = ClusterServiceStub(channel)
        while num_rounds is None or num_rounds > 0:
            status = stub.GetStatus(pb.GetStatusRequest(), timeout=_DEADLINE_S).status
            show(live_table(status, rates, clock.now_s()))
            time.sleep(_EVERY_S)
            num_rounds = num_rounds - 1 if num_rounds is not None else None


class Rates:
    """Turns counters that only rise into amounts a second, by what was seen last time."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int, str], tuple[float, float]] = {}

    def of(self, member: pb.MemberHealth, counter: str, value: float, now_s: float) -> float:
        """Return how fast a member's counter rises; 0 when it is seen for the first time."""
        key = (member.name, member.incarnation, counter)
        before_s, before = self._last.get(key, (now_s, value))
        self._last[key] = (now_s, value)
        return (value - before) / (now_s - before_s) if now_s > before_s else 0.0


def live_table(status: pb.ClusterStatus, rates: Rates, now_s: float) -> Group:
    """Return the cluster at one moment: pools, what is wrong, and every member's load."""
    view = status.view
    pools = ", ".join(
        f"{_role(p.role)} {p.serving}/{p.wanted}" + (f" + {p.standby} standby" if p.standby else "")
        for p in status.pools
    )
    moving = f", {status.replicas_loading} replicas load" if status.replicas_loading else ""
    lacking = f", copies lack for {status.rebalancing_s:.0f} s" if status.rebalancing_s else ""
    head = Text(f"term {view.term}, version {view.version}: {pools}{moving}{lacking}")
    if status.HasField("last_rebalance"):
        last = status.last_rebalance
        left = f", {status.replicas_moving} still to move" if status.replicas_moving else ""
        head.append(
            f"\nrebalanced {last.count} times, {last.age_s:.0f} s ago: {last.num_moves} replicas "
            f"to save {100 * last.gain:.0f} % of the busiest workers' experts{left}"
        )
    for line in _scales(status):
        head.append(f"\n{line}")
    trouble = [Text(f"  {reason}", style="red") for reason in status.reasons]
    table = Table(box=SIMPLE)
    table.add_column("id", no_wrap=True)
    for column in ("state", "phase", "slots", "rows/s", "busy", "queue", "tokens/s"):
        table.add_column(column)
    table.add_column("waits for experts")
    table.add_column("silent")
    members = {(m.name, m.incarnation): m for m in view.members}
    for health in status.members:
        member = members.get((health.name, health.incarnation))
        table.add_row(*_cells(health, member, rates, now_s), style="red" if health.suspect else "")
    return Group(head, *trouble, table)


def _role(role: pb.Role.ValueType) -> str:
    return pb.Role.Name(role).removeprefix("ROLE_").lower()


def _scales(status: pb.ClusterStatus) -> list[str]:
    """Return a line for each number of members that follows load, and for its latest changes."""
    lines = []
    for pool in status.pools:
        if pool.HasField("scale"):
            bounds = f"by load, {pool.scale.min} to {pool.scale.max}"
            lines.append(
                f"{_role(pool.role)} {bounds}, which needs {pool.scale.enough}: {pool.scale.why}"
            )
    for change in status.scale_changes[-_NUM_CHANGES:]:
        ago = f"{change.age_s:.0f} s ago"
        what = f"{_role(change.role)} {change.before} -> {change.after}"
        lines.append(f"  {ago} {what}: {change.why}")
    return lines


def _cells(
    health: pb.MemberHealth, member: pb.Member | None, rates: Rates, now_s: float
) -> list[str]:
    state = pb.MemberState.Name(member.state) if member else "MEMBER_STATE_UNPUBLISHED"
    rows = busy = queue = tokens = waits = slots = ""
    if health.HasField("worker_stats"):
        worker = health.worker_stats
        rows = f"{rates.of(health, 'rows', worker.rows, now_s):.0f}"
        busy = f"{100 * health.busy_share:.0f} %"
        queue = f"{1000 * health.queue_age_s:.0f} ms"
        slots = f"{worker.slots_used}/{worker.slots_total}"
    if health.HasField("gateway_stats"):
        gateway = health.gateway_stats
        done = gateway.tokens_generated + gateway.tokens_prefilled
        tokens = f"{rates.of(health, 'tokens', done, now_s):.0f}"
        queue = f"{gateway.running} run, {gateway.waiting} wait"
        parked_s = rates.of(health, "parked_s", gateway.parked_s, now_s)
        waits = f"{100 * health.waiting_share:.0f} %"
        if parked_s:
            waits += f", parked {100 * parked_s:.0f} %"
    return [
        f"{health.name}.{health.incarnation}",
        state.removeprefix("MEMBER_STATE_").lower() + (", leaves" if health.leaving else ""),
        health.phase,
        slots,
        rows,
        busy,
        queue,
        tokens,
        waits,
        f"{health.silent_s:.1f} s",
    ]
