"""The life of one member, from its first process to its end: a table of phases and pure steps.

A member is one process, or for a gateway one process a rank. All of them finish a phase before the
next one begins; the death of one is the end of the member.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType

from cluster.control.ports import Opened, ProcessId, Pulse
from cluster.control.shares import ShareWindow
from workers.placement import Member, MemberState, Role


class Phase(Enum):
    """What a member is doing; the value is the method that its processes run for it."""

    OPEN = "open"
    JOIN = "join"
    LOAD = "load"
    START = "start"
    STANDBY = "standby"
    SERVE = "serve"
    DRAIN = "drain"
    END = "end"


# Tuples, not sets: looked at in every tick, and Python hashes a member of an enumeration slowly.
RESTING = (Phase.STANDBY, Phase.SERVE, Phase.END)  # no call: left when somebody decides
PULSING = (Phase.STANDBY, Phase.SERVE, Phase.DRAIN)  # asked for a pulse now and then
MAY_STAND_BY = (Role.EXPERT_WORKER, Role.GATEWAY)
_SETTLED = (Phase.STANDBY, Phase.LOAD, Phase.SERVE, Phase.DRAIN)

# A worker opens its links before it has experts, so that it can stand by with nothing but a load
# between it and serving; a gateway stands by with its weights, and only begins to listen.
PHASES: Mapping[Role, tuple[Phase, ...]] = MappingProxyType(
    {
        Role.EXPERT_WORKER: (Phase.OPEN, Phase.START, Phase.STANDBY, Phase.LOAD, Phase.SERVE),
        Role.GATEWAY: (
            Phase.OPEN,
            Phase.JOIN,
            Phase.LOAD,
            Phase.STANDBY,
            Phase.START,
            Phase.SERVE,
        ),
        Role.FRONT_DOOR: (Phase.OPEN, Phase.START, Phase.SERVE),
    }
)
_LAST_STATES: Mapping[Phase, MemberState] = MappingProxyType(
    {
        Phase.SERVE: MemberState.ACTIVE,
        Phase.DRAIN: MemberState.DRAINING,
        Phase.END: MemberState.GONE,
    }
)


@dataclass(slots=True)
class Life:
    """One member's processes and how far they are.

    `enlisted` says that it serves or is to; the others stand by. `leaving` says
    that the member goes for good as soon as it is not needed; `relieved`, that this is when another
    one serves in its place.
    """

    member: Member
    processes: tuple[ProcessId, ...]
    phase: Phase = Phase.OPEN
    since_s: float = 0.0  # of the phase
    awaited: set[ProcessId] = field(default_factory=set)
    opened: dict[ProcessId, Opened] = field(default_factory=dict)
    pulses: dict[ProcessId, Pulse] = field(default_factory=dict)
    heard_s: dict[ProcessId, float] = field(default_factory=dict)
    asked: set[ProcessId] = field(default_factory=set)
    shares: ShareWindow = field(default_factory=ShareWindow)
    enlisted: bool = False
    leaving: bool = False
    relieved: bool = False
    loads_since_s: float | None = None  # while it serves
    missed: bool = False  # leaves for its silence alone: until it is heard again

    @property
    def role(self) -> Role:
        """The member's role."""
        return self.member.role

    @property
    def between_phases(self) -> bool:
        """Whether every process has finished the phase, so that the next may begin."""
        return not self.awaited and self.phase not in RESTING

    @property
    def is_called_up(self) -> bool:
        """Whether it has stood by and is to serve; a worker waits for what it is to load."""
        return self.phase is Phase.STANDBY and self.enlisted and self.role is Role.GATEWAY

    @property
    def progress(self) -> int:
        """How far it has come on its way to serve; -1 once it leaves that."""
        phases = PHASES[self.role]
        return phases.index(self.phase) if self.phase in phases else -1

    @property
    def is_settled(self) -> bool:
        """Whether it has come as far as it can without experts."""
        return self.phase in _SETTLED

    def silent_s(self, now_s: float) -> float:
        """Return for how long the quietest process has not been heard; 0 before it must be."""
        return now_s - min(self.heard_s.values()) if self.phase in PULSING else 0.0

    def loading_s(self, now_s: float) -> float:
        """Return for how long it has loaded experts while it serves; 0 while it does not."""
        return 0.0 if self.loads_since_s is None else now_s - self.loads_since_s

    def start_over(self, now_s: float) -> None:
        """Count its silence and the time of what it does from now on."""
        self.heard_s = dict.fromkeys(self.heard_s, now_s)
        self.since_s = now_s
        self.loads_since_s = None if self.loads_since_s is None else now_s

    def next_phase(self) -> Phase:
        """Return the phase that follows."""
        if self.phase is Phase.DRAIN:
            return Phase.END
        phases = PHASES[self.role]
        return phases[phases.index(self.phase) + 1]

    def enlist(self, cell: int) -> None:
        """Have it serve in a cell as soon as it can."""
        self.enlisted = True
        self.member = replace(self.member, cell=cell)

    def enter(self, phase: Phase, now_s: float) -> None:
        """Begin a phase: every process is awaited, except in those that have no call."""
        self.phase = phase
        self.since_s = now_s
        self.heard_s = dict.fromkeys(self.processes, now_s)
        self.awaited = set() if phase in RESTING else set(self.processes)
        self.member = replace(self.member, state=_state(self.role, phase))

    def finish(self, process: ProcessId, value: object) -> None:
        """Note that one process has finished the phase, with what it says of itself."""
        self.awaited.discard(process)
        if isinstance(value, Opened):
            before = self.opened.get(process)
            self.opened[process] = _merged(before, value) if before else value
            self.member = _described(self.member, [self.opened.get(p) for p in self.processes])


def adopted(member: Member, processes: tuple[ProcessId, ...], now_s: float) -> Life | None:
    """Return the life of a member that an earlier controller left, or None if it must start anew.

    Whatever was half done is given up: only who served, or stood by, goes on.
    """
    is_worker = member.role is Role.EXPERT_WORKER
    serves = member.serves
    if not serves and not (is_worker and member.state is MemberState.WARM):
        return None
    life = Life(member, processes, enlisted=serves)
    life.enter(Phase.SERVE if serves else Phase.STANDBY, now_s)
    life.opened = {
        process: Opened(
            pid=member.pids[rank] if rank < len(member.pids) else member.pid,
            node=member.node_of(rank),
            num_slots=member.num_slots,
            endpoint=member.endpoint,
            store=member.stores[rank] if rank < len(member.stores) else "",
            metrics=member.metrics,
        )
        for rank, process in enumerate(processes)
    }
    return life


def _state(role: Role, phase: Phase) -> MemberState:
    """Return the state of a phase; WARM is who only lacks the last step before it serves."""
    last = _LAST_STATES.get(phase)
    if last is not None:
        return last
    if role is Role.EXPERT_WORKER:
        warm = phase in {Phase.STANDBY, Phase.LOAD}
    else:
        warm = phase in {Phase.STANDBY, Phase.START}
    return MemberState.WARM if warm else MemberState.JOINING


def _merged(before: Opened, after: Opened) -> Opened:
    return Opened(
        pid=after.pid,
        node=after.node,
        num_slots=after.num_slots or before.num_slots,
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
        num_slots=first.num_slots or member.num_slots,
        pid=first.pid,
        pids=tuple(o.pid for o in opened if o is not None),
        nodes=tuple("" if o is None else o.node for o in opened),
        endpoint=first.endpoint,
        metrics=first.metrics,
        stores=tuple(o.store for o in opened if o is not None and o.store),
    )
