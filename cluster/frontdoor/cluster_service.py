"""The cluster RPCs: the View that this front door holds, as clients see it."""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc

from cluster import wire
from cluster.frontdoor.service import FrontDoorParts, guarded
from cluster.pb.expertmesh.v1 import cluster_pb2, cluster_pb2_grpc
from workers.errors import UnavailableError
from workers.placement import ExpertId, Member, MemberId, MemberState, Role, View
from workers.types import GatewayStats

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_UNCOVERED = 32  # of them are listed; the rest are counted
_ROLES = {
    Role.CONTROLLER: cluster_pb2.ROLE_CONTROLLER,
    Role.FRONT_DOOR: cluster_pb2.ROLE_FRONT_DOOR,
    Role.GATEWAY: cluster_pb2.ROLE_GATEWAY,
    Role.EXPERT_WORKER: cluster_pb2.ROLE_EXPERT_WORKER,
}
_STATES = {
    MemberState.JOINING: cluster_pb2.MEMBER_STATE_JOINING,
    MemberState.WARM: cluster_pb2.MEMBER_STATE_WARM,
    MemberState.ACTIVE: cluster_pb2.MEMBER_STATE_ACTIVE,
    MemberState.DRAINING: cluster_pb2.MEMBER_STATE_DRAINING,
    MemberState.GONE: cluster_pb2.MEMBER_STATE_GONE,
}


class ViewCache:
    """The newest View that was adopted, and what of it is costly to work out."""

    def __init__(self, *, experts_in_gateway: bool) -> None:
        self.view: View | None = None
        self.uncovered: list[ExpertId] = []
        self._experts_in_gateway = experts_in_gateway
        self._changed = asyncio.Event()

    def adopt(self, view: View) -> bool:
        """Keep a View if it is newer; says whether it was."""
        if self.view is not None and view.order <= self.view.order:
            return False
        self.view = view
        self.uncovered = [] if self._experts_in_gateway else view.uncovered()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return True

    @property
    def is_covered(self) -> bool:
        """Whether every expert has a replica on a serving worker."""
        return self.view is not None and not self.uncovered

    async def change(self) -> None:
        """Wait for a newer View."""
        await self._changed.wait()


class ClusterService(cluster_pb2_grpc.ClusterServiceServicer):
    """GetView and WatchView."""

    def __init__(self, parts: FrontDoorParts, cache: ViewCache) -> None:
        self._parts = parts
        self._cache = cache

    async def GetView(
        self, request: cluster_pb2.GetViewRequest, context: Context
    ) -> cluster_pb2.GetViewResponse:
        """Return the newest View."""
        del request
        async with guarded(self._parts, "GetView", context):
            return cluster_pb2.GetViewResponse(view=self._message())
        raise AssertionError  # the guard has raised

    async def WatchView(  # type: ignore[override]
        self, request: cluster_pb2.WatchViewRequest, context: Context
    ) -> None:
        """Stream the newest View, now and whenever a newer one is adopted."""
        del request
        async with guarded(self._parts, "WatchView", context):
            while True:
                if self._cache.view is not None:
                    await context.write(cluster_pb2.WatchViewResponse(view=self._message()))
                await self._cache.change()

    def _message(self) -> cluster_pb2.View:
        if self._cache.view is None:
            raise UnavailableError("this front door has not been told of the cluster yet")
        return view_message(self._cache.view, self._cache.uncovered, self._parts.pool.stats())


def view_message(
    view: View, uncovered: list[ExpertId], gateway_stats: Mapping[MemberId, GatewayStats]
) -> cluster_pb2.View:
    """Return a View as clients see it."""
    placement = view.placement
    return cluster_pb2.View(
        term=view.term,
        version=view.version,
        weights_version=placement.weights_version,
        members=[
            _member_message(m, len(placement.held_by(m.id)), gateway_stats.get(m.id))
            for m in sorted(view.members, key=lambda m: (m.role.value, m.id))
        ],
        coverage=cluster_pb2.Coverage(
            complete=not uncovered,
            num_experts=placement.num_layers * placement.num_experts,
            num_uncovered=len(uncovered),
            uncovered=[
                cluster_pb2.UncoveredExpert(layer=e.layer, expert=e.expert)
                for e in uncovered[:_MAX_UNCOVERED]
            ],
        ),
    )


def _member_message(
    member: Member, slots_used: int, stats: GatewayStats | None
) -> cluster_pb2.Member:
    return cluster_pb2.Member(
        name=member.id.name,
        incarnation=member.id.incarnation,
        role=_ROLES[member.role],
        state=_STATES[member.state],
        node=member.node,
        pid=member.pid,
        endpoint=member.endpoint,
        num_slots=member.num_slots,
        slots_used=slots_used,
        metrics=member.metrics,
        gateway_stats=None if stats is None else wire.stats_message(stats),
    )
