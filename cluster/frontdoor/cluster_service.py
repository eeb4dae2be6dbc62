"""The cluster RPCs: the View that this front door holds, and what operators ask."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import grpc

from cluster import wire
from cluster.control.scaling.autoscaler import PoolScale
from cluster.control.status import ClusterStatus, MemberStatus
from cluster.frontdoor.operator import Operator
from cluster.frontdoor.service import FrontDoorParts, guarded
from cluster.pb.expertmesh.v1 import cluster_pb2, cluster_pb2_grpc
from workers.errors import FieldViolation, InvalidRequestError, UnavailableError
from workers.placement import ExpertId, Member, MemberId, MemberState, Role, View
from workers.types import GatewayStats, WorkerStats

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_UNCOVERED = 32  # of them are listed; the rest are counted
_ROLES = {
    Role.CONTROLLER: cluster_pb2.ROLE_CONTROLLER,
    Role.FRONT_DOOR: cluster_pb2.ROLE_FRONT_DOOR,
    Role.GATEWAY: cluster_pb2.ROLE_GATEWAY,
    Role.EXPERT_WORKER: cluster_pb2.ROLE_EXPERT_WORKER,
}
_SCALABLE = {_ROLES[role]: role for role in (Role.EXPERT_WORKER, Role.GATEWAY, Role.FRONT_DOOR)}
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

    @property
    def changed(self) -> asyncio.Event:
        """What is set when a newer View than the present one is adopted."""
        return self._changed


class ClusterService(cluster_pb2_grpc.ClusterServiceServicer):
    """GetView and WatchView from what is known here; the rest goes to the controller."""

    def __init__(self, parts: FrontDoorParts, cache: ViewCache, operator: Operator) -> None:
        self._parts = parts
        self._cache = cache
        self._operator = operator

    async def GetView(
        self, request: cluster_pb2.GetViewRequest, context: Context
    ) -> cluster_pb2.GetViewResponse:
        """Return the newest View."""
        del request
        async with guarded(self._parts, "GetView", context, for_operators=True):
            return cluster_pb2.GetViewResponse(view=self._message())
        raise AssertionError  # the guard has raised

    async def WatchView(  # type: ignore[override]
        self, request: cluster_pb2.WatchViewRequest, context: Context
    ) -> None:
        """Stream the newest View, now and whenever a newer one is adopted."""
        del request
        async with guarded(self._parts, "WatchView", context, for_operators=True):
            while True:
                changed = self._cache.changed  # before writing, which takes a while
                if self._cache.view is not None:
                    await context.write(cluster_pb2.WatchViewResponse(view=self._message()))
                await changed.wait()

    async def GetStatus(
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.GetStatusResponse:
        """Return the controller's word on every member."""
        del request
        async with guarded(self._parts, "GetStatus", context, for_operators=True):
            status = await self._operator.status()
            return cluster_pb2.GetStatusResponse(status=status_message(status))
        raise AssertionError  # the guard has raised

    async def Scale(
        self, request: cluster_pb2.ScaleRequest, context: Context
    ) -> cluster_pb2.ScaleResponse:
        """Set how many members of a role are wanted."""
        async with guarded(self._parts, "Scale", context, for_operators=True):
            role = _SCALABLE.get(request.role)
            if role is None:
                raise InvalidRequestError(
                    FieldViolation("role", "must be expert worker, gateway or front door")
                )
            before = await self._operator.scale(role, request.count)
            return cluster_pb2.ScaleResponse(previous_count=before)
        raise AssertionError  # the guard has raised

    async def Drain(
        self, request: cluster_pb2.DrainRequest, context: Context
    ) -> cluster_pb2.DrainResponse:
        """Have one member leave for good."""
        async with guarded(self._parts, "Drain", context, for_operators=True):
            if not request.member:
                raise InvalidRequestError(FieldViolation("member", "must name a member"))
            member = await self._operator.drain(request.member)
            return cluster_pb2.DrainResponse(name=member.name, incarnation=member.incarnation)
        raise AssertionError  # the guard has raised

    def _message(self) -> cluster_pb2.View:
        if self._cache.view is None:
            raise UnavailableError("this front door has not been told of the cluster yet")
        return view_message(self._cache.view, self._cache.uncovered, self._parts.pool.stats())


def status_message(status: ClusterStatus) -> cluster_pb2.ClusterStatus:
    """Return the controller's word as clients see it; the controller is among the members."""
    view = view_message(status.view, status.view.uncovered(), {})
    scales = {scale.role: scale for scale in status.scales}
    if status.controller is not None:
        view.members.insert(0, _member_message(status.controller, 0, None))
    return cluster_pb2.ClusterStatus(
        view=view,
        ready=status.ready,
        reasons=status.reasons,
        members=[_health_message(member) for member in status.members],
        pools=[
            cluster_pb2.Pool(
                role=_ROLES[pool.role],
                wanted=pool.wanted,
                serving=pool.serving,
                standby=pool.standby,
                scale=_scale_message(scales.get(pool.role)),
            )
            for pool in status.pools
        ],
        rebalancing_s=status.rebalancing_s,
        replicas_loading=status.replicas_loading,
        allows_chaos=status.allows_chaos,
        replicas_moving=status.replicas_moving,
        last_rebalance=_rebalance_message(status),
        scale_changes=[
            cluster_pb2.ScaleChange(
                role=_ROLES[change.role],
                age_s=age_s,
                before=change.before,
                after=change.after,
                why=change.why,
            )
            for age_s, change in status.scaled
        ],
    )


def _scale_message(scale: PoolScale | None) -> cluster_pb2.PoolScale | None:
    if scale is None:
        return None
    return cluster_pb2.PoolScale(min=scale.min, max=scale.max, enough=scale.enough, why=scale.why)


def _rebalance_message(status: ClusterStatus) -> cluster_pb2.Rebalance | None:
    last = status.last_rebalance
    if last is None:
        return None
    return cluster_pb2.Rebalance(
        age_s=status.last_rebalance_age_s,
        count=last.count,
        num_moves=last.num_moves,
        gain=last.gain,
    )


def _health_message(status: MemberStatus) -> cluster_pb2.MemberHealth:
    term, version = min((pulse.order for pulse in status.pulses), default=(0, 0))
    stats = [pulse.stats for pulse in status.pulses]
    worker = next((s for s in stats if isinstance(s, WorkerStats)), None)
    gateway = next((s for s in stats if isinstance(s, GatewayStats)), None)
    return cluster_pb2.MemberHealth(
        name=status.member.id.name,
        incarnation=status.member.id.incarnation,
        phase=status.phase,
        silent_s=status.silent_s,
        suspect=status.suspect,
        leaving=status.leaving,
        adopted_term=term,
        adopted_version=version,
        worker_stats=None if worker is None else cluster_pb2.WorkerStats(**asdict(worker)),
        gateway_stats=None if gateway is None else wire.stats_message(gateway),
        busy_share=status.shares.busy,
        waiting_share=status.shares.waiting,
        queue_age_s=status.shares.queue_age_s,
    )


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
        pids=member.pids,
        endpoint=member.endpoint,
        num_slots=member.num_slots,
        slots_used=slots_used,
        metrics=member.metrics,
        cell=member.cell,
        gateway_stats=None if stats is None else wire.stats_message(stats),
    )
