"""`expertmesh status`: the View of a cluster, as a table or as JSON."""

import sys

import orjson
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from cluster.cli.client import channel_to
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from cluster.pb.expertmesh.v1.cluster_pb2_grpc import ClusterServiceStub

_DEADLINE_S = 10.0


def status_command(server: str, *, as_json: bool) -> None:
    """Print the members of the cluster behind a front door."""
    with channel_to(server) as channel:
        view = ClusterServiceStub(channel).GetView(pb.GetViewRequest(), timeout=_DEADLINE_S).view
    if as_json:
        tree = MessageToDict(
            view, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        sys.stdout.write(orjson.dumps(tree, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        Console().print(_table(view))


def _table(view: pb.View) -> Table:
    missing = view.coverage.num_uncovered
    coverage = f"{missing} experts uncovered" if missing else "all experts covered"
    table = Table(
        title=f"term {view.term}, version {view.version}: {coverage}", title_justify="left"
    )
    for column in ("role", "id", "incarnation", "state", "pid", "node", "slots", "endpoint"):
        table.add_column(column)
    for member in view.members:
        slots = f"{member.slots_used}/{member.num_slots}" if member.num_slots else ""
        table.add_row(
            pb.Role.Name(member.role).removeprefix("ROLE_").lower(),
            member.name,
            str(member.incarnation),
            pb.MemberState.Name(member.state).removeprefix("MEMBER_STATE_").lower(),
            str(member.pid or ""),
            member.node[:12],
            slots,
            member.endpoint,
        )
    return table
