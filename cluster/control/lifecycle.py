"""The life of one member, from its first process to its end: a table of phases and pure steps.

A member is one process, or for a gateway one process a rank. All of them finish a phase before the
next one begins; the death of one is the end of the member.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType

from cluster.control.ports import Opened, ProcessId, Pulse
from workers.placement import Member, MemberState, Role


class Phase(Enum):
    """What a member is doing; the value is the method that its processes run for it."""

    OPEN = "open"
    JOIN = "join"
    LOAD = "load"
    START = "start"
    SERVE = "serve"
    DRAIN = "drain"
    END = "end"


PHASES: Mapping[Role, tuple[Phase, ...]] = MappingProxyType(
    {
        Role.EXPERT_WORKER: (Phase.OPEN, Phase.LOAD, Phase.START, Phase.SERVE),
        Role.GATEWAY: (Phase.OPEN, Phase.JOIN, Phase.LOAD, Phase.START, Phase.SERVE),
        Role.FRONT_DOOR: (Phase.OPEN, Phase.START, Phase.SERVE),
    }
)
_STATES: Mapping[Phase, MemberState] = MappingProxyType(
    {
        Phase.OPEN: MemberState.JOINING,
        Phase.JOIN: MemberState.JOINING,
        Phase.LOAD: MemberState.JOINING,
        Phase.START: MemberState.WARM,
        Phase.SERVE: MemberState.ACTIVE,
        Phase.DRAIN: MemberState.DRAINING,
        Phase.END: MemberState.GONE,
    }
)


@dataclass(slots=True)
class Life:
    """One member's processes and how far they are."""

    member: Member
    processes: tuple[ProcessId, ...]
    phase: Phase = Phase.OPEN
    awaited: set[ProcessId] = field(default_factory=set)
    opened: dict[ProcessId, Opened] = field(default_factory=dict)
    pulses: dict[ProcessId, Pulse] = field(default_factory=dict)
    heard_s: dict[ProcessId, float] = field(default_factory=dict)
    asked: set[ProcessId] = field(default_factory=set)
    reason: str = ""

    @property
    def role(self) -> Role:
        """The member's role."""
        return self.member.role

    @property
    def between_phases(self) -> bool:
        """Whether every process has finished the phase, so that the next may begin."""
        return not self.awaited and self.phase not in {Phase.SERVE, Phase.END}

    def next_phase(self) -> Phase:
        """Return the phase that follows."""
        if self.phase is Phase.DRAIN:
            return Phase.END
        phases = PHASES[self.role]
        return phases[phases.index(self.phase) + 1]

    def enter(self, phase: Phase) -> None:
        """Begin a phase: every process is awaited, except in those that have no call."""
        self.phase = phase
        self.awaited = set() if phase in {Phase.SERVE, Phase.END} else set(self.processes)
        self.member = replace(self.member, state=_STATES[phase])

    def finish(self, process: ProcessId, value: object) -> None:
        """Note that one process has finished the phase, with what it says of itself."""
        self.awaited.discard(process)
        if isinstance(value, Opened):
            before = self.opened.get(process)
            self.opened[process] = _merged(before, value) if before else value
            self.member = _described(self.member, [self.opened.get(p) for p in self.processes])


def _merged(before: Opened, after: Opened) -> Opened:
    return Opened(
        pid=after.pid,
        node=after.node,
        endpoint=after.endpoint or before.endpoint,
        store=after.store or before.store,
        metrics=after.metrics or before.metrics,
        rendezvous=after.rendezvous or before.rendezvous,
    )


def _described(member: Member, opened: list[Opened | None]) -> Member:
    """Return the member with what its processes said: rank 0 speaks for a gateway."""
    first = opened[0]
    if first is None:
        return member
    return replace(
        member,
        node=first.node,
        pid=first.pid,
        endpoint=first.endpoint,
        metrics=first.metrics,
        stores=tuple(o.store for o in opened if o is not None and o.store),
    )
