"""Faults in the members of a running cluster, done one after the other at random moments."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc

from cluster.chaos.stalls import Window
from cluster.pb.expertmesh.v1 import cluster_pb2 as pb
from workers.clock import Clock
from workers.errors import UnavailableError

_POLL_S = 0.25
_RECOVERY_S = 180.0
_RPC_S = 15.0
_FREEZE_S = (0.5, 5.0)
_PAUSE_S = (0.1, 1.5)
_AFTER_S = 1.0  # that the window of a fault goes on at least


class Fault(Enum):
    """What may be done to a cluster."""

    KILL = "kill"
    KILL_TWO = "kill two"
    FREEZE = "freeze"
    JOIN = "join"
    DRAIN = "drain"
    KILL_CONTROLLER = "kill controller"


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was done: its window, who was hit, and when the cluster was whole again."""

    window: Window
    members: tuple[str, ...]
    whole_after_s: float


def draw_faults(counts: dict[Fault, int], seed: int) -> list[Fault]:
    """Return all faults in a random order, in which no drain comes before its join."""
    draw = random.Random(f"{seed}/faults")  # noqa: S311 - a load, not a secret
    faults = [fault for fault, count in counts.items() for _ in range(count)]
    draw.shuffle(faults)
    joined = 0
    for index, fault in enumerate(faults):
        if fault is Fault.DRAIN and joined <= 0:
            later = [i for i in range(index + 1, len(faults)) if faults[i] is Fault.JOIN]
            if later:
                faults[index], faults[later[0]] = faults[later[0]], faults[index]
        joined += {Fault.JOIN: 1, Fault.DRAIN: -1}.get(faults[index], 0)
    return faults


class Saboteur:
    """Does faults to the cluster behind a front door; only to processes of this machine.

    Args:
        stub: A `ClusterServiceStub` of grpc.aio.
        seed: Draws moments and victims.
        clock: That of the load, so that windows and arrivals compare.
        progress: Called with what was done.
    """

    def __init__(
        self,
        stub: Any,  # noqa: ANN401
        *,
        seed: int,
        clock: Clock,
        progress: Callable[[Done], None] = lambda _done: None,
    ) -> None:
        self._stub = stub
        self._clock = clock
        self._progress = progress
        self._draw = random.Random(f"{seed}/victims")  # noqa: S311 - a load, not a secret
        self.done: list[Done] = []

    async def run(self, faults: Sequence[Fault]) -> None:
        """Do the faults in order; each waits until the cluster is whole after the one before.

        Raises UnavailableError when it is not whole again in time.
        """
        actions: dict[Fault, Callable[[], Awaitable[tuple[str, ...]]]] = {
            Fault.KILL: lambda: self._kill(1),
            Fault.KILL_TWO: lambda: self._kill(2),
            Fault.FREEZE: self._freeze,
            Fault.JOIN: lambda: self._scale(1),
            Fault.DRAIN: lambda: self._scale(-1),
            Fault.KILL_CONTROLLER: self._kill_controller,
        }
        for fault in faults:
            await asyncio.sleep(self._draw.uniform(*_PAUSE_S))
            start_s = self._clock.now_s()
            members = await actions[fault]()
            acted_s = self._clock.now_s()
            ended = members if fault in {Fault.KILL, Fault.KILL_TWO, Fault.KILL_CONTROLLER} else ()
            await self.whole(without=ended)
            now_s = self._clock.now_s()
            end_s = max(
                now_s if fault in {Fault.JOIN, Fault.DRAIN} else acted_s, start_s + _AFTER_S
            )
            self._note(Window(fault.value, start_s, end_s), members, now_s - acted_s)

    async def whole(self, without: Collection[str] = ()) -> pb.ClusterStatus:
        """Wait until as many members serve as are wanted, and every copy is there.

        `without` names members that the controller must first have noticed to be gone. Raises
        UnavailableError after some minutes.
        """
        deadline_s = self._clock.now_s() + _RECOVERY_S
        reasons: Sequence[str] = ()
        while self._clock.now_s() < deadline_s:
            status = await self.status()
            if status is not None:
                known = {f"{m.name}.{m.incarnation}" for m in status.view.members}
                if (
                    status.ready
                    and not status.rebalancing_s
                    and all(pool.serving == pool.wanted for pool in status.pools)
                    and not any(member.leaving for member in status.members)
                    and known.isdisjoint(without)
                ):
                    return status
                reasons = status.reasons
            await asyncio.sleep(_POLL_S)
        raise UnavailableError(f"not whole after {_RECOVERY_S:g} s: {'; '.join(reasons)}")

    @contextlib.asynccontextmanager
    async def fault(self, kind: str, members: tuple[str, ...]) -> AsyncIterator[None]:
        """Note what is done inside as a fault, then wait until the cluster is whole."""
        start_s = self._clock.now_s()
        yield
        acted_s = self._clock.now_s()
        await self.whole()
        window = Window(kind, start_s, acted_s + _AFTER_S)
        self._note(window, members, self._clock.now_s() - acted_s)

    async def scale_to(self, role: pb.Role.ValueType, count: int) -> None:
        """Bring a pool to a size, wait until the cluster is whole, and note it as a fault."""
        before = await self.whole()
        (wanted,) = [pool.wanted for pool in before.pools if pool.role == role]
        if wanted == count:
            return
        start_s = self._clock.now_s()
        await self._stub.Scale(pb.ScaleRequest(role=role, count=count), timeout=_RPC_S)
        await self.whole()
        name = pb.Role.Name(role).removeprefix("ROLE_").lower().replace("_", " ")
        self._note(
            Window(f"{name}s", start_s, self._clock.now_s()),
            (f"{wanted} to {count}",),
            self._clock.now_s() - start_s,
        )

    def _note(self, window: Window, members: tuple[str, ...], whole_after_s: float) -> None:
        done = Done(window, members, whole_after_s)
        self.done.append(done)
        self._progress(done)

    async def status(self) -> pb.ClusterStatus | None:
        """Return the controller's word; None while there is no controller."""
        try:
            answer = await self._stub.GetStatus(pb.GetStatusRequest(), timeout=_RPC_S)
        except grpc.aio.AioRpcError:
            return None
        status: pb.ClusterStatus = answer.status
        return status

    async def _victims(self, count: int) -> list[pb.Member]:
        status = await self.whole()
        serving = [
            m
            for m in status.view.members
            if m.role == pb.ROLE_EXPERT_WORKER and m.state == pb.MEMBER_STATE_ACTIVE
        ]
        return self._draw.sample(serving, min(count, len(serving)))

    async def _kill(self, count: int) -> tuple[str, ...]:
        victims = await self._victims(count)
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        return tuple(f"{v.name}.{v.incarnation}" for v in victims)

    async def _freeze(self) -> tuple[str, ...]:
        (victim,) = await self._victims(1)
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._draw.uniform(*_FREEZE_S))
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        return (f"{victim.name}.{victim.incarnation}",)

    async def _scale(self, by: int) -> tuple[str, ...]:
        status = await self.whole()
        (wanted,) = [p.wanted for p in status.pools if p.role == pb.ROLE_EXPERT_WORKER]
        request = pb.ScaleRequest(role=pb.ROLE_EXPERT_WORKER, count=wanted + by)
        await self._stub.Scale(request, timeout=_RPC_S)
        return ()

    async def _kill_controller(self) -> tuple[str, ...]:
        status = await self.whole()
        (me,) = [m for m in status.view.members if m.role == pb.ROLE_CONTROLLER]
        os.kill(me.pid, signal.SIGKILL)
        return (f"{me.name}.{me.incarnation}",)
