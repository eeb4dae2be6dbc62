"""`expertmesh scale` and `expertmesh drain`: what operators ask of a running cluster."""

from enum import Enum

from rich.console import Console

from cluster.cli.client import Server, channel_to
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from cluster.pb.expertmesh.v1.cluster_pb2_grpc import ClusterServiceStub

_DEADLINE_S = 15.0


class Pool(Enum):
    """A role, in the words of the command line."""

    EXPERTS = "experts"
    GATEWAYS = "gateways"
    FRONT_DOORS = "frontdoors"


_ROLES = {
    Pool.EXPERTS: pb.ROLE_EXPERT_WORKER,
    Pool.GATEWAYS: pb.ROLE_GATEWAY,
    Pool.FRONT_DOORS: pb.ROLE_FRONT_DOOR,
}


def scale_command(server: Server, pool: Pool, count: int) -> None:
    """Ask for so many members of a pool and say how many there were to be before."""
    with channel_to(server) as channel:
        answer = ClusterServiceStub(channel).Scale(
            pb.ScaleRequest(role=_ROLES[pool], count=count), timeout=_DEADLINE_S
        )
    Console().print(f"{pool.value}: {answer.previous_count} -> {count} wanted", highlight=False)


def drain_command(server: Server, member: str) -> None:
    """Ask one member to leave and say which one does."""
    with channel_to(server) as channel:
        answer = ClusterServiceStub(channel).Drain(
            pb.DrainRequest(member=member), timeout=_DEADLINE_S
        )
    Console().print(
        f"{answer.name}.{answer.incarnation} leaves; `expertmesh status --watch` shows how far",
        highlight=False,
    )
