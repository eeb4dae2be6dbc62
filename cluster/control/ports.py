"""What the controller needs from the outside: processes to start and call, and durable storage.

Everything is a plain value or a non-blocking call, so that the same controller runs on Ray, in unit
tests and under simulation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from workers.placement import MemberId, Role, View


@dataclass(frozen=True, slots=True, order=True)
class ProcessId:
    """One process of a member: a gateway has one per rank, everybody else one."""

    member: MemberId
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.member}.r{self.rank}" if self.rank else str(self.member)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """How to start one process: its body as MODULE:CLASS, and what it asks of a node.

    Processes with the same `gang` start together or not at all, close to each other.
    """

    id: ProcessId
    role: Role
    body: str
    arguments: tuple[Any, ...] = ()
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    gang: tuple[str, int] | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Returned:
    """A call came back with a value."""

    process: ProcessId
    method: str
    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """A call came back with an error; the process lives on."""

    process: ProcessId
    method: str
    error: str


@dataclass(frozen=True, slots=True)
class Died:
    """A process has ended, whatever the reason."""

    process: ProcessId
    reason: str


@dataclass(frozen=True, slots=True)
class Leaving:
    """The node of a process is about to go: what it alone holds must be moved at once."""

    process: ProcessId
    reason: str


RuntimeEvent = Returned | Raised | Died | Leaving


class Runtime(Protocol):
    """Starts processes and carries slow control messages to them. No method blocks."""

    def spawn(self, spec: ProcessSpec) -> None:
        """Start a process; its death, also at birth, comes as `Died`."""
        ...

    def adopt(self, process: ProcessId, node: str) -> None:
        """Take over a process that an earlier controller started; `Died` if it is not there.

        `node` is where it said that it runs, "" where that is not known.
        """
        ...

    def call(self, process: ProcessId, term: int, method: str, *arguments: object) -> None:
        """Call a method of a process; `poll` returns the outcome, unless the process died.

        A process that has heard of a higher term raises RefusedError.
        """
        ...

    def poll(self) -> Sequence[RuntimeEvent]:
        """Return what has happened since the last poll, in order of arrival."""
        ...

    def kill(self, process: ProcessId) -> None:
        """End a process at once; it comes as `Died` unless it had died already."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeNeed:
    """The nodes that the members of one role need.

    `count` members are wanted, standbys with them. `nodes` are the ids of the nodes that hold some
    now, whatever these do; `num_unplaced` processes have not said yet where they are.
    """

    role: Role
    count: int
    nodes: frozenset[str] = frozenset()
    num_unplaced: int = 0


class Actuator(Protocol):
    """Has nodes come for members that are wanted, and go when members have left.

    No method blocks.
    """

    def provide(self, needs: Sequence[NodeNeed]) -> None:
        """Work towards these, in place of what was asked for before; called again and again.

        A node that is named in a need is never taken away.
        """
        ...

    def trouble(self) -> str:
        """Say why nodes do not come or go as they are asked for; "" while they do."""
        ...

    def close(self) -> None:
        """Work towards nothing any more; what was asked for last stays."""
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """What a controller must find again: the View, and how many members of each role are wanted.

    `leaving` are the members that leave for good. `configured` is how many the configuration asked
    for, from which `wanted` may have been scaled. `rolling`: outdated members are being replaced.
    `fixed` are the values that all of them have in common for good. Those of `leaving` that are
    `relieved` go when another one serves in their place.
    """

    view: View
    wanted: Mapping[Role, int] = field(default_factory=dict)
    leaving: frozenset[MemberId] = frozenset()
    configured: Mapping[Role, int] = field(default_factory=dict)
    rolling: bool = False
    fixed: Mapping[str, str] = field(default_factory=dict)
    relieved: frozenset[MemberId] = frozenset()


class Journal(Protocol):
    """Durable storage of Views, and the fence between controllers."""

    def claim_term(self, above: int = 0) -> int:
        """Take a term by compare-and-set, higher than all before and than `above`.

        No two controllers ever hold the same.
        """
        ...

    def is_leading(self) -> bool:
        """Whether no higher term than the one claimed here has been claimed."""
        ...

    def append(self, record: Record) -> None:
        """Store a record before its View is published.

        Raises RefusedError when a higher term has been claimed: this controller is superseded.
        """
        ...

    def latest(self) -> Record | None:
        """Return the newest record, or None when there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a process says of itself when it has started; `num_slots` 0 is what it was told."""

    pid: int
    node: str
    num_slots: int = 0
    endpoint: str = ""
    store: str = ""
    metrics: str = ""
    rendezvous: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What a process says of itself regularly.

    `order` is the (term, version) of the View that it has adopted. `ready` says whether a request
    that reached it now would be served. `failure` is a reason to replace it. `load` is what a
    gateway's rank has counted since its last pulse.
    """

    order: tuple[int, int] = (0, 0)
    ready: bool = False
    idle: bool = True
    failure: str = ""
    stats: object = None
    load: object = None  # a `LoadReport`: whoever only reads a status needs no numpy for it
