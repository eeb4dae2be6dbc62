"""Members, Placement and View: which processes exist and which expert replica lives where.

All of it is immutable data. One Controller writes Views; everybody else caches the newest one.
Views are ordered by (term, version).
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

NO_CELL = -1  # of a member that stands by: any cell may call it up


class Role(Enum):
    """What a member does."""

    CONTROLLER = "controller"
    FRONT_DOOR = "frontdoor"
    GATEWAY = "gateway"
    EXPERT_WORKER = "expert_worker"

    @property
    def plural(self) -> str:
        """What several of them are called."""
        return "front doors" if self is Role.FRONT_DOOR else f"{self.value.replace('_', ' ')}s"


class MemberState(Enum):
    """Where a member stands between joining and having gone."""

    JOINING = "joining"
    WARM = "warm"
    ACTIVE = "active"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True, order=True)
class MemberId:
    """Identity of one life of a member: never reused, a restarted process is a new incarnation."""

    name: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.name}.{self.incarnation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A member as everybody sees it.

    `endpoint` is where its gRPC server listens (front doors, gateways). `stores` holds, for a
    gateway, one HOST:PORT per rank: the TCPStore over which that rank's links are opened; `pids`
    one process per rank, and `nodes` where each runs. `metrics` is the HOST:PORT of its Prometheus
    page. `settings` names what it was started with. A gateway calls the expert workers of its
    `cell`.
    """

    id: MemberId
    role: Role
    state: MemberState
    node: str = ""
    pid: int = 0
    pids: tuple[int, ...] = ()
    endpoint: str = ""
    metrics: str = ""
    stores: tuple[str, ...] = ()
    num_slots: int = 0
    settings: str = ""
    cell: int = 0
    nodes: tuple[str, ...] = ()

    def node_of(self, rank: int) -> str:
        """Return the node of one rank; "" where it has not told."""
        if rank < len(self.nodes):
            return self.nodes[rank]
        return "" if rank else self.node

    @property
    def serves(self) -> bool:
        """Whether calls may be sent to it; a draining one still serves what nobody else holds."""
        return self.state is MemberState.ACTIVE or self.state is MemberState.DRAINING


@dataclass(frozen=True, slots=True, order=True)
class ExpertId:
    """A logical expert of one layer."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True, order=True)
class Replica:
    """A physical copy of an expert: the slot of a worker that holds its weights."""

    worker: MemberId
    slot: int


@dataclass(frozen=True)
class Placement:
    """Which replicas each expert has; `weights_version` names the checkpoint that they hold."""

    weights_version: str
    num_layers: int
    num_experts: int
    replicas: dict[ExpertId, tuple[Replica, ...]] = field(default_factory=dict)

    def is_like(self, other: "Placement") -> bool:
        """Whether it is of the same checkpoint."""
        return (self.weights_version, self.num_layers, self.num_experts) == (
            other.weights_version,
            other.num_layers,
            other.num_experts,
        )

    def of(self, layer: int, expert: int) -> tuple[Replica, ...]:
        """Return the replicas of one expert, in a fixed order; empty when it has none."""
        return self.replicas.get(ExpertId(layer, expert), ())

    def held_by(self, worker: MemberId) -> dict[ExpertId, int]:
        """Return the slot of each expert that one worker holds."""
        return self._by_worker.get(worker, {})

    def uncovered(self, serving: Iterable[MemberId]) -> list[ExpertId]:
        """Return the experts without a replica on any of the serving workers."""
        alive = frozenset(serving)
        return [
            expert
            for layer in range(self.num_layers)
            for expert in (ExpertId(layer, e) for e in range(self.num_experts))
            if not any(r.worker in alive for r in self.replicas.get(expert, ()))
        ]

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as one array: object by object it takes several times as long."""
        numbers: dict[MemberId, int] = {}
        table = array("i")
        for expert, replicas in self.replicas.items():
            table.extend((expert.layer, expert.expert, len(replicas)))
            for replica in replicas:
                number = numbers.setdefault(replica.worker, len(numbers))
                table.extend((number, replica.slot))
        arguments = (self.weights_version, self.num_layers, self.num_experts)
        return _placement, (*arguments, tuple(numbers), table.tobytes())

    @cached_property
    def _by_worker(self) -> dict[MemberId, dict[ExpertId, int]]:
        by_worker: dict[MemberId, dict[ExpertId, int]] = {}
        for expert, replicas in self.replicas.items():
            for replica in replicas:
                by_worker.setdefault(replica.worker, {})[expert] = replica.slot
        return by_worker


def _placement(
    weights_version: str,
    num_layers: int,
    num_experts: int,
    workers: tuple[MemberId, ...],
    table: bytes,
) -> Placement:
    """Return a placement that was pickled."""
    numbers = iter(memoryview(table).cast("i"))
    replicas = {}
    for layer in numbers:
        expert, count = ExpertId(layer, next(numbers)), next(numbers)
        replicas[expert] = tuple(
            Replica(workers[next(numbers)], next(numbers)) for _ in range(count)
        )
    return Placement(weights_version, num_layers, num_experts, replicas)


@dataclass(frozen=True)
class View:
    """The cluster at one (term, version): its members and where experts live."""

    term: int
    version: int
    members: tuple[Member, ...]
    placement: Placement

    @property
    def order(self) -> tuple[int, int]:
        """What orders Views: a member adopts only a higher one."""
        return (self.term, self.version)

    def with_role(self, role: Role) -> tuple[Member, ...]:
        """Return the members of one role that have not gone, in order of identity."""
        return tuple(
            sorted(
                (m for m in self.members if m.role is role and m.state is not MemberState.GONE),
                key=lambda m: m.id,
            )
        )

    def serving_workers(self) -> tuple[Member, ...]:
        """Return the expert workers to which calls may be sent."""
        return tuple(m for m in self.with_role(Role.EXPERT_WORKER) if m.serves)

    def uncovered(self) -> list[ExpertId]:
        """Return the experts that no serving worker holds: their rows would be parked."""
        return self.placement.uncovered(m.id for m in self.serving_workers())

    def cell_of(self, member: MemberId) -> int | None:
        """Return the cell of a member; None for one that is not in the View."""
        return next((m.cell for m in self.members if m.id == member), None)

    def within(self, cell: int | None) -> "View":
        """Return the View as the gateways of one cell use it; None stands for all cells.

        Of expert workers there are those of the cell and those that stand by. What none of them
        serves is borrowed from the next cell that does, and nothing else of that cell is there.
        """
        if cell is None:
            return self
        workers = self.with_role(Role.EXPERT_WORKER)
        near = {m.id for m in workers if m.cell in {cell, NO_CELL}}
        if len(near) == len(workers):
            return self
        lacking = frozenset(
            self.placement.uncovered(m.id for m in workers if m.serves and m.id in near)
        )
        replicas = {
            expert: tuple(r for r in found if r.worker in near)
            for expert, found in self.placement.replicas.items()
        }
        for expert in lacking if cell != NO_CELL else ():
            replicas[expert] = (*replicas.get(expert, ()), *self._lent(expert, cell))
        used = near | {r.worker for expert in lacking for r in replicas.get(expert, ())}
        return replace(
            self,
            members=tuple(
                m for m in self.members if m.role is not Role.EXPERT_WORKER or m.id in used
            ),
            placement=replace(self.placement, replicas=replicas),
        )

    def callers_of(self, worker: MemberId) -> tuple[Member, ...]:
        """Return the gateways that may call an expert worker: its cell's, and who borrows it."""
        gateways = self.with_role(Role.GATEWAY)
        cells, cell = {m.cell for m in gateways}, self.cell_of(worker)
        if cell is None or cell == NO_CELL or cells == {cell}:
            return gateways
        calling = {c for c in cells if c == cell or (c != NO_CELL and self._lends(worker, c))}
        return tuple(m for m in gateways if m.cell in calling)

    @cached_property
    def _cells_of_serving(self) -> dict[MemberId, int]:
        return {m.id: m.cell for m in self.serving_workers()}

    def _lent(self, expert: ExpertId, cell: int) -> list[Replica]:
        """Return the replicas at which a cell that lacks an expert calls it: the next cell's."""
        cells = self._cells_of_serving
        num_cells = 1 + max(cells.values(), default=0)
        far = [r for r in self.placement.replicas.get(expert, ()) if cells.get(r.worker, -1) >= 0]
        nearest = min(((cells[r.worker] - cell) % num_cells for r in far), default=0)
        return [r for r in far if (cells[r.worker] - cell) % num_cells == nearest]

    def _lends(self, worker: MemberId, cell: int) -> bool:
        """Whether a worker of another cell serves something that none of this cell's does."""
        cells, replicas = self._cells_of_serving, self.placement.replicas
        lacking = (
            expert
            for expert in (self.placement.held_by(worker) if worker in cells else ())
            if not any(cells.get(r.worker) in {cell, NO_CELL} for r in replicas[expert])
        )
        return any(r.worker == worker for expert in lacking for r in self._lent(expert, cell))
