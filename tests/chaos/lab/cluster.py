"""One run: controllers, workers and gateways in virtual time, with faults drawn from the seed."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cluster.control.controller import Controller
from cluster.control.options import ControllerOptions, Desired, RebalanceOptions
from cluster.control.ports import (
    Died,
    Opened,
    ProcessId,
    ProcessSpec,
    Raised,
    Record,
    Returned,
    RuntimeEvent,
)
from tests.chaos.lab.links import Network
from tests.chaos.lab.members import SimGateway, SimProcess, SimWorker, ViolationError
from tests.chaos.lab.simulator import Simulator, SpinError
from workers.dispatch.options import DispatchOptions, MessageShape
from workers.errors import ExpertmeshError, NotFoundError, RefusedError
from workers.placement import MemberId, MemberState, Placement, Role, View

NUM_LAYERS, NUM_EXPERTS = 2, 4
TICK_S = 0.15
LOOK_S = 0.2
FORMED_S, END_S, CALM_S = 20.0, 120.0, 40.0
FAULTS = (
    "kill", "kill two", "freeze", "slow", "cut", "break", "join", "drain", "kill controller",
    "double controller", "freeze and kill", "late views", "disown", "drain and kill",
    "poison",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LabOptions:
    """The size of a run."""

    num_gateways: int = 2
    num_workers: int = 4
    num_steps: int = 20
    num_faults: int = 3


def lost_by_a_move(before: View, after: View) -> bool:
    """Whether an expert lost its last copy although all who served it still do."""
    serving = {m.id for m in after.serving_workers()}
    return any(
        all(replica.worker in serving for replica in before.placement.replicas[expert])
        for expert in after.uncovered()
        if expert not in before.uncovered()
    )


class Crash(Exception):  # noqa: N818 - not an error of the product
    """A controller's process ends while it writes."""


class SimJournal:
    """Durable storage that all controllers share; each has one of these."""

    def __init__(self, shared: "SimJournal | None" = None) -> None:
        self._shared = shared or self
        self.highest = self.term = 0
        self.records: list[Record] = []
        self.crash = ""  # whether the next record is the end: "before" or "after" it is stored

    def claim_term(self, above: int = 0) -> int:
        self.term = self._shared.highest = max(self._shared.highest, above) + 1
        return self.term

    def is_leading(self) -> bool:
        return self._shared.highest <= self.term

    def append(self, record: Record) -> None:
        if self.crash == "before":
            raise Crash
        if not self.is_leading():
            raise RefusedError(f"term {self.term} is superseded")
        records = self._shared.records
        if records and record.view.order <= records[-1].view.order:
            raise ViolationError(f"I5: View {record.view.order} after {records[-1].view.order}")
        if records and lost_by_a_move(records[-1].view, record.view):
            raise ViolationError(f"I4: View {record.view.order} moves the last copy of an expert")
        records.append(record)
        if self.crash == "after":
            raise Crash

    def latest(self) -> Record | None:
        return self._shared.records[-1] if self._shared.records else None


class SimRuntime:
    """A controller's hands: calls and their outcomes take virtual time."""

    def __init__(self, cluster: "SimCluster") -> None:
        self._cluster = cluster
        self._events: list[RuntimeEvent] = []
        self._watched: set[ProcessId] = set()

    def spawn(self, spec: ProcessSpec) -> None:
        self._watched.add(spec.id)
        self._cluster.spawn(spec)

    def adopt(self, process: ProcessId, _node: str) -> None:
        self._watched.add(process)
        if process not in self._cluster.processes:
            self._events.append(Died(process, "not there"))

    def call(self, process: ProcessId, term: int, method: str, *arguments: object) -> None:
        target = self._cluster.processes.get(process)
        if target is None:
            return

        def work() -> None:
            try:
                value = target.handle(term, method, *arguments)
                event: RuntimeEvent = Returned(process, method, value)
            except ExpertmeshError as error:
                event = Raised(process, method, str(error))
            if target.is_alive or method == "drain":
                self._cluster.soon(lambda: self._events.append(event))

        start = partial(self._cluster.simulator.start, work)
        late_s = self._cluster.lateness_s() if method == "adopt" else 0.0
        self._cluster.soon(lambda: target.soon(start), late_s)

    def poll(self) -> list[RuntimeEvent]:
        events, self._events = self._events, []
        return events

    def kill(self, process: ProcessId) -> None:
        self._cluster.end(process)

    def died(self, process: ProcessId) -> None:
        if process in self._watched:
            self._watched.discard(process)
            self._events.append(Died(process, "it ended"))


@dataclass(slots=True)
class SimController:
    """A controller that ticks until it dies."""

    controller: Controller
    runtime: SimRuntime
    journal: SimJournal
    is_alive: bool = True


@dataclass(slots=True)
class Outcome:
    """What came of one seed."""

    seed: int
    violation: str = ""
    trace: list[str] = field(default_factory=list)
    faults: tuple[str, ...] = ()
    stats: Counter[str] = field(default_factory=Counter)


class SimCluster:
    """All processes of one run."""

    def __init__(
        self,
        seed: int,
        options: LabOptions,
        make_controller: Callable[..., Controller] = Controller,
    ) -> None:
        self.simulator = Simulator(seed)
        self.options = options
        self.processes: dict[ProcessId, SimProcess] = {}
        self.gateways: list[SimGateway] = []
        self.controllers: list[SimController] = []
        self._make_controller = make_controller
        draw = self.simulator.draw
        self._floor = draw.choice((1, 2, 2))
        self._standby = draw.choice((0, 0, 1))
        self._warm = draw.choice((0, 0, 1))
        self._num_slots = draw.choice((4, 5, 6, 8))
        self._rebalance_s = draw.choice((0.0, 0.0, 1.0))
        self._cells = draw.choice((1, 1, 2))
        self._journal = SimJournal()
        shape = MessageShape(hidden_size=1, top_k=2, dtype=torch.float32)
        self.net = Network(self.simulator, shape, capacity=4)
        self._reached_since_s: dict[SimGateway, float] = {}
        self._late_views_until_s = 0.0
        self._ended_alone: Counter[float] = Counter()  # workers, by the row they computed then

    # Processes

    def lateness_s(self) -> float:
        """Return how long a View takes: now and then much longer than all that comes after it."""
        draw = self.simulator.draw
        late = self.simulator.now_s() < self._late_views_until_s
        return draw.uniform(0.0, 2.5 if late else 0.8) if late or draw.random() < 0.3 else 0.0

    def soon(self, action: Callable[[], object], late_s: float = 0.0) -> None:
        self.simulator.after(self.simulator.draw.uniform(0.0005, 0.01) + late_s, action)

    def spawn(self, spec: ProcessSpec) -> None:
        simulator, process = self.simulator, spec.id
        if spec.role is Role.GATEWAY:
            made: SimProcess = SimGateway(
                simulator,
                process,
                net=self.net,
                find=self._find,
                num_layers=NUM_LAYERS,
                num_experts=NUM_EXPERTS,
                num_steps=self.options.num_steps,
                num_ended_alone=self._ended_alone.__getitem__,
                options=DispatchOptions(
                    capacity_rows=32, num_buffers=2, first_deadline_s=0.3, min_deadline_s=0.05
                ),
            )
        else:
            made = SimWorker(
                simulator,
                process,
                num_slots=self._num_slots,
                num_layers=NUM_LAYERS,
                num_experts=NUM_EXPERTS,
                node=f"n{len(self.processes) % 2}",
                end=self.end,
            )
        self.processes[process] = made
        self.gateways = [p for p in self.processes.values() if isinstance(p, SimGateway)]

    def end(self, process: ProcessId) -> None:
        """A process ends: its links break, and who watches it hears of it."""
        target = self.processes.pop(process, None)
        if target is None:
            return
        target.is_alive = False
        if isinstance(target, SimWorker):
            if target.alone is not None:
                self._ended_alone[target.alone] += 1
            for link in target.links:
                link.is_reset = self.simulator.draw.random() < 0.8
        self.gateways = [p for p in self.processes.values() if isinstance(p, SimGateway)]
        draw = self.simulator.draw
        for gateway in self.gateways:
            lose = partial(gateway.links.lose, target.member)
            self.simulator.after(draw.uniform(0.001, 0.1), lose)
        for controller in self.controllers:
            heard = partial(controller.runtime.died, process)
            self.simulator.after(draw.uniform(0.005, 0.1), heard)

    def _find(self, member: MemberId) -> SimWorker | None:
        found = self.processes.get(ProcessId(member))
        return found if isinstance(found, SimWorker) else None

    @property
    def workers(self) -> list[SimWorker]:
        return [p for p in self.processes.values() if isinstance(p, SimWorker) and p.is_alive]

    # Controllers

    def start_controller(self, *, resume: bool) -> None:
        runtime, journal = SimRuntime(self), SimJournal(self._journal)
        options = self.options
        controller = self._make_controller(
            Desired(
                members={
                    Role.EXPERT_WORKER: options.num_workers,
                    Role.GATEWAY: options.num_gateways,
                },
                num_slots=self._num_slots,
                floor=self._floor,
                cells=self._cells,
                standby={Role.EXPERT_WORKER: self._standby, Role.GATEWAY: self._warm},
            ),
            Placement("lab", NUM_LAYERS, NUM_EXPERTS),
            {role: partial(_blueprint, role) for role in (Role.EXPERT_WORKER, Role.GATEWAY)},
            runtime=runtime,
            journal=journal,
            clock=self.simulator,
            options=ControllerOptions(
                pulse_s=0.75,
                silence_s=1.5,
                lost_s=4.0,
                restore_s=2.0,
                rebalance=RebalanceOptions(
                    period_s=self._rebalance_s, half_life_s=3.0, min_calls=1.0, always=True
                ),
            ),
            resume=resume,
        )
        made = SimController(controller, runtime, journal)
        self.controllers.append(made)
        self._tick(made)

    def _tick(self, made: SimController) -> None:
        if made.is_alive and not made.controller.superseded:
            with self._surviving(made):
                made.controller.tick()
            self.simulator.after(TICK_S, lambda: self._tick(made))

    @contextlib.contextmanager
    def _surviving(self, made: SimController) -> Iterator[None]:
        """Let a controller do something, which may be its end: then there will be another one."""
        try:
            yield
        except Crash:
            self._end_controller(made)

    def _end_controller(self, made: SimController) -> None:
        if made.is_alive:
            made.is_alive = False
            delay_s = self.simulator.draw.uniform(0.05, 1.0)
            self.simulator.after(delay_s, lambda: self.start_controller(resume=True))

    @property
    def leader(self) -> Controller | None:
        leading = [c for c in self.controllers if c.is_alive and not c.controller.superseded]
        return leading[-1].controller if leading else None

    # The run

    def run(self) -> Outcome:
        """Form, be harmed while steps run, be calm again; every invariant is looked at."""
        outcome = Outcome(0)
        try:
            self._run(outcome)
        except ViolationError as violation:
            outcome.violation = str(violation)
        except SpinError as error:
            outcome.violation = f"I9: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, no member may end by it
            outcome.violation = f"crash: {error!r}"
        outcome.trace = self.simulator.trace
        for gateway in self.gateways:
            outcome.stats.update({k: v for k, v in gateway.dispatcher.stats().items()
                                  if isinstance(v, int)})  # fmt: skip
        return outcome

    def _run(self, outcome: Outcome) -> None:
        draw = self.simulator.draw
        self.start_controller(resume=False)
        if not self._run_until(FORMED_S, self._formed):
            raise ViolationError(f"I9: the cluster did not form: {self._state()}")
        count = self.options.num_faults + draw.choice((0, 0, 0, 3))
        outcome.faults = tuple(draw.choice(FAULTS) for _ in range(count))
        for fault in outcome.faults:
            self.simulator.after(draw.uniform(0.0, 2.5), partial(self.harm, fault))
        self._look()
        if not self.simulator.run(END_S, self._is_done):
            raise ViolationError(f"I9: steps do not end: {self._state()}")
        if not self._run_until(self.simulator.now_s() + CALM_S, self._calm):
            raise ViolationError(f"I9: Views and replicas do not converge: {self._state()}")
        self._compare()

    def _compare(self) -> None:
        """Workers hold what the View says (I3), and nobody runs of whom it does not know (I5)."""
        leader = self.leader
        assert leader is not None
        view = leader.view
        for member in view.serving_workers():
            worker, said = self._find(member.id), view.placement.held_by(member.id)
            wrong = [e for e, slot in said.items() if worker and not worker.remembers(e, slot)]
            if wrong:
                raise ViolationError(f"I3: {member.id} is said to hold {wrong}, and does not")
        strangers = self.processes.keys() - {ProcessId(member.id) for member in view.members}
        if strangers:
            raise ViolationError(f"I5: {strangers} run, and the View does not know them")

    def _run_until(self, until_s: float, holds: Callable[[], bool]) -> bool:
        """Run until something holds, which is looked at every now and then only."""
        found = []

        def look() -> None:
            if holds():
                found.append(True)
            else:
                self.simulator.after(LOOK_S, look)

        self.simulator.after(0.0, look)
        return self.simulator.run(until_s, lambda: bool(found))

    def harm(self, fault: str) -> None:
        """Do one fault."""
        simulator, draw = self.simulator, self.simulator.draw
        workers = [w for w in self.workers if not w.is_frozen]
        victim = draw.choice(workers) if workers else None
        length_s = draw.uniform(0.2, 3.0)
        simulator.note(f"{fault}: {victim.member if victim else ''} {length_s:.2f}")
        if fault in {"join", "drain"} and self.leader is not None:
            wanted = self.leader.status().pools[0].wanted
            count = wanted + (1 if fault == "join" else -1)
            if count >= 2:  # refused where a cell could not hold every expert
                with contextlib.suppress(RefusedError), self._surviving(self.controllers[-1]):
                    self.leader.scale(Role.EXPERT_WORKER, count)
        elif fault == "kill controller" and self.leader is not None:
            made = self.controllers[-1]
            made.journal.crash = draw.choice(("", "before", "after"))
            at_s = length_s if made.journal.crash else 0.0  # unless it writes nothing until then
            simulator.after(at_s, partial(self._end_controller, made))
        elif fault == "drain and kill" and self.leader is not None and victim is not None:
            leaves_already = contextlib.suppress(RefusedError, NotFoundError)
            with leaves_already, self._surviving(self.controllers[-1]):
                self.leader.drain(victim.member.name)
            self._end_leaving(victim, simulator.now_s() + length_s)
        elif fault == "late views":
            self._late_views_until_s = simulator.now_s() + length_s
        elif fault == "double controller":
            self.start_controller(resume=True)
        elif fault == "poison":
            running = [g for g in self.gateways if not g.is_done]
            for gateway in draw.sample(running, draw.randint(min(1, len(running)), len(running))):
                gateway.num_poisoned += draw.choice((1, 1, 3))  # sent again by its client
        elif victim is None:
            return
        elif fault in {"kill", "kill two"}:
            self.end(victim.process)
            others = [w for w in self.workers if w is not victim]
            if fault == "kill two" and others:
                self.end(draw.choice(others).process)
        elif fault in {"freeze", "freeze and kill"}:
            victim.is_frozen = True
            ending = (lambda: self.end(victim.process)) if "kill" in fault else victim.thaw
            simulator.after(2 * length_s, ending)
        elif fault == "disown":
            victim.disown(length_s)
        elif fault == "slow":
            for worker in draw.sample(workers, draw.randrange(1, len(workers) + 1)):
                worker.slow_until_s = simulator.now_s() + length_s
        else:
            gateway = draw.choice(self.gateways)
            if fault == "cut":
                pair = gateway.member, victim.member
                self.net.cut_until_s[pair] = simulator.now_s() + length_s
                if draw.random() < 0.5:
                    simulator.after(length_s / 2, partial(gateway.links.lose, victim.member))
            else:
                gateway.links.lose(victim.member)

    def _end_leaving(self, worker: SimWorker, until_s: float) -> None:
        """End a worker as soon as it is told to go, or when the time is up."""
        leader = self.leader
        states = {m.id: m.state for m in leader.view.members} if leader is not None else {}
        goes = states.get(worker.member) is MemberState.DRAINING
        if goes or self.simulator.now_s() >= until_s:
            self.end(worker.process)
        else:
            self.simulator.after(0.05, partial(self._end_leaving, worker, until_s))

    # What must hold

    def _formed(self) -> bool:
        leader = self.leader
        return leader is not None and leader.status().ready

    def _calm(self) -> bool:
        leader = self.leader
        if leader is None or leader.status().reasons or leader.status().rebalancing_s:
            return False
        order = leader.view.order
        return all(p.order == order for p in self.processes.values() if p.is_alive)

    def _look(self) -> None:
        """Look, now and then, whether a step takes longer than its rows explain (I10)."""
        now_s = self.simulator.now_s()
        for gateway in self.gateways:
            if gateway.is_done:
                continue
            if self._reaches_all(gateway):
                since_s = self._reached_since_s.setdefault(gateway, now_s)
                waits_s = now_s - max(since_s, gateway.step_since_s)
                if gateway.step_since_s and waits_s > max(1.5, gateway.deadline_s + 0.5):
                    raise ViolationError(
                        f"I10: {gateway.member} waits for {waits_s:.2f} s while every expert "
                        "is within its reach"
                    )
            else:
                self._reached_since_s.pop(gateway, None)
        if not self._is_done():
            self.simulator.after(LOOK_S, self._look)

    def _is_done(self) -> bool:
        """Whether as many gateways as are wanted have done their steps; a warm one does none."""
        done = 0
        for gateway in self.gateways:  # after every event: a generator would cost a hundredth
            done += gateway.is_done
        return done >= self.options.num_gateways

    def _reaches_all(self, gateway: SimGateway) -> bool:
        """Whether each expert has a quick worker that a gateway may call and has a link to."""
        if gateway.view is None:
            return False
        view = gateway.view.within(gateway.view.cell_of(gateway.member))
        now_s = self.simulator.now_s()
        near = set()
        for member in view.serving_workers():
            worker = self._find(member.id)
            peer = gateway.links.peers.get(member.id)
            if (
                worker is not None
                and worker.is_alive
                and not worker.is_frozen
                and worker.slow_until_s < now_s
                and peer is not None
                and peer.open is not None
                and not self.net.is_cut(gateway.member, member.id)
            ):
                near |= worker.slots.held().keys() & view.placement.held_by(member.id).keys()
        return len(near) == NUM_LAYERS * NUM_EXPERTS

    def _state(self) -> str:
        leader = self.leader
        reasons = "; ".join(leader.status().reasons) if leader else "no controller"
        steps = ", ".join(f"{g.member} {g.steps_done}" for g in self.gateways)
        waits = [
            f"{g.member}: {len(c.state.outstanding)} awaited, {len(c.state.needs())} parked"
            for g in self.gateways
            for c in g.dispatcher._outbox.calls
        ]
        return f"{reasons} | steps {steps} | {waits}"


def _blueprint(role: Role, member: MemberId) -> tuple[ProcessSpec, ...]:
    return (ProcessSpec(id=ProcessId(member), role=role, body="lab"),)


def run_seed(seed: int, options: LabOptions | None = None, **more: Any) -> Outcome:
    """Run one seed."""
    cluster = SimCluster(seed, options or LabOptions(), **more)
    outcome = cluster.run()
    outcome.seed = seed
    return outcome


__all__ = ["LabOptions", "Opened", "Outcome", "SimCluster", "run_seed"]
