"""Faults in the members of a running cluster, done one after the other at random moments."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import grpc

from cluster.chaos.doors import Doors
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
    KILL_GATEWAY = "kill gateway"
    FREEZE_GATEWAY = "freeze gateway"
    KILL_FRONT_DOOR = "kill front door"
    KILL_BOTH = "kill front door and gateway"
    CUT = "cut connections"


_KILLED_ROLES: Mapping[Fault, tuple[pb.Role.ValueType, ...]] = MappingProxyType(
    {
        Fault.KILL: (pb.ROLE_EXPERT_WORKER,),
        Fault.KILL_TWO: (pb.ROLE_EXPERT_WORKER, pb.ROLE_EXPERT_WORKER),
        Fault.KILL_CONTROLLER: (pb.ROLE_CONTROLLER,),
        Fault.KILL_GATEWAY: (pb.ROLE_GATEWAY,),
        Fault.KILL_FRONT_DOOR: (pb.ROLE_FRONT_DOOR,),
        Fault.KILL_BOTH: (pb.ROLE_FRONT_DOOR, pb.ROLE_GATEWAY),
    }
)
BREAKS_STREAMS = frozenset({Fault.KILL_FRONT_DOOR, Fault.KILL_BOTH, Fault.CUT})  # of clients
_LASTING = frozenset({Fault.JOIN, Fault.DRAIN})  # until the cluster is whole


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
    """Does faults to the cluster behind front doors; only to processes of this machine.

    Args:
        doors: Where the cluster is asked.
        seed: Draws moments and victims.
        clock: That of the load, so that windows and arrivals compare.
        progress: Called with what was done.
    """

    def __init__(
        self,
        doors: Doors,
        *,
        seed: int,
        clock: Clock,
        progress: Callable[[Done], None] = lambda _done: None,
    ) -> None:
        self._doors = doors
        self._clock = clock
        self._progress = progress
        self._draw = random.Random(f"{seed}/victims")  # noqa: S311 - a load, not a secret
        self._mortal: set[int] = set()  # processes that must end, since one of their member's did
        self.done: list[Done] = []

    async def run(self, faults: Sequence[Fault]) -> None:
        """Do the faults in order; each waits until the cluster is whole after the one before.

        Raises UnavailableError when it is not whole again in time.
        """
        for fault in faults:
            await asyncio.sleep(self._draw.uniform(*_PAUSE_S))
            await self.strike(fault)

    async def strike(self, *faults: Fault) -> None:
        """Do some faults at once, and wait until the cluster is whole; see `run`."""
        status = await self.whole()
        start_s = self._clock.now_s()
        members = await asyncio.gather(*(self._do(fault, status) for fault in faults))
        acted_s = self._clock.now_s()
        ended = [
            name
            for fault, names in zip(faults, members, strict=True)
            if fault in _KILLED_ROLES
            for name in names
        ]
        await self.whole(without=ended)
        now_s = self._clock.now_s()
        is_slow = not _LASTING.isdisjoint(faults)
        end_s = max(now_s if is_slow else acted_s, start_s + _AFTER_S)
        kind = " + ".join(fault.value for fault in faults)
        names = tuple(name for names in members for name in names)
        self._note(Window(kind, start_s, end_s), names, now_s - acted_s)

    async def whole(self, without: Collection[str] = ()) -> pb.ClusterStatus:
        """Wait until as many members serve as are wanted, and every copy is there.

        `without` names members that the controller must first have noticed to be gone; no process
        of theirs may be left. Raises UnavailableError after some minutes.
        """
        deadline_s = self._clock.now_s() + _RECOVERY_S
        reasons: Sequence[str] = ()
        while self._clock.now_s() < deadline_s:
            status = await self.status()
            if status is not None:
                known = {f"{m.name}.{m.incarnation}" for m in status.view.members}
                await self._doors.adopt(status.view)
                if (
                    status.ready
                    and not status.rebalancing_s
                    and all(pool.serving == pool.wanted for pool in status.pools)
                    and not any(member.leaving for member in status.members)
                    and known.isdisjoint(without)
                    and not self._survivors()
                ):
                    return status
                reasons = [*status.reasons, *(f"process {p} lives" for p in self._mortal)]
            await asyncio.sleep(_POLL_S)
        raise UnavailableError(f"not whole after {_RECOVERY_S:g} s: {'; '.join(reasons)}")

    def must_end(self, pids: Collection[int]) -> None:
        """Note the processes of a member that ends: the cluster is whole once they have gone."""
        self._mortal.update(pids)

    @contextlib.asynccontextmanager
    async def fault(
        self, kind: str, members: tuple[str, ...], *, without: Collection[str] = ()
    ) -> AsyncIterator[None]:
        """Note what is done inside as a fault, then wait until the cluster is whole `without` some.

        See `whole`.
        """
        start_s = self._clock.now_s()
        yield
        acted_s = self._clock.now_s()
        await self.whole(without)
        window = Window(kind, start_s, acted_s + _AFTER_S)
        self._note(window, members, self._clock.now_s() - acted_s)

    async def scale_to(self, role: pb.Role.ValueType, count: int) -> None:
        """Bring a pool to a size, wait until the cluster is whole, and note it as a fault."""
        before = await self.whole()
        (wanted,) = [pool.wanted for pool in before.pools if pool.role == role]
        if wanted == count:
            return
        start_s = self._clock.now_s()
        await self._doors.ask("Scale", pb.ScaleRequest(role=role, count=count), _RPC_S)
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
            answer = await self._doors.ask("GetStatus", pb.GetStatusRequest(), _RPC_S)
        except (grpc.aio.AioRpcError, UnavailableError):
            return None
        status: pb.ClusterStatus = answer.status
        return status

    async def _do(self, fault: Fault, status: pb.ClusterStatus) -> tuple[str, ...]:
        """Do one fault to a whole cluster; returns whom it hit."""
        if fault in _KILLED_ROLES:
            return self._kill(self._victims(status, *_KILLED_ROLES[fault]))
        match fault:
            case Fault.FREEZE:
                return await self._freeze(*self._victims(status, pb.ROLE_EXPERT_WORKER))
            case Fault.FREEZE_GATEWAY:
                return await self._freeze(*self._victims(status, pb.ROLE_GATEWAY))
            case Fault.JOIN:
                return await self._scale(status, 1)
            case Fault.DRAIN:
                return await self._scale(status, -1)
            case Fault.CUT:
                return self._doors.cut()
            case _:
                raise AssertionError(fault)

    def _victims(self, status: pb.ClusterStatus, *roles: pb.Role.ValueType) -> list[pb.Member]:
        """Draw one serving member of each role given, none twice."""
        left = [m for m in status.view.members if m.state == pb.MEMBER_STATE_ACTIVE]
        victims = []
        for role in roles:
            candidates = [m for m in left if m.role == role]
            if candidates:
                victims.append(self._draw.choice(candidates))
                left.remove(victims[-1])
        return victims

    def _process_of(self, member: pb.Member) -> int:
        """Draw one process of a member: a gateway has one for each rank."""
        return self._draw.choice(list(member.pids) or [member.pid])

    def _kill(self, victims: Sequence[pb.Member]) -> tuple[str, ...]:
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process_of(victim), signal.SIGKILL)
            self.must_end(victim.pids)
        return tuple(f"{v.name}.{v.incarnation}" for v in victims)

    async def _freeze(self, victim: pb.Member) -> tuple[str, ...]:
        pid = self._process_of(victim)
        with contextlib.suppress(ProcessLookupError):  # it was given up and ended meanwhile
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self._draw.uniform(*_FREEZE_S))
            finally:
                os.kill(pid, signal.SIGCONT)
        return (f"{victim.name}.{victim.incarnation}",)

    def _survivors(self) -> set[int]:
        """Return the processes of dead members that are still there."""
        for pid in list(self._mortal):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                self._mortal.discard(pid)
        return self._mortal

    async def _scale(self, status: pb.ClusterStatus, by: int) -> tuple[str, ...]:
        (wanted,) = [p.wanted for p in status.pools if p.role == pb.ROLE_EXPERT_WORKER]
        request = pb.ScaleRequest(role=pb.ROLE_EXPERT_WORKER, count=wanted + by)
        await self._doors.ask("Scale", request, _RPC_S)
        return ()
