"""The controller: hears what has happened, decides, and brings the cluster to what is wanted.

It is the one writer of Views. Nothing on the data path waits for it. One `tick` does one round and
never blocks, so that tests and the simulator call it directly.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

import structlog

from cluster.control.lifecycle import Life, Phase
from cluster.control.planner import place
from cluster.control.ports import (
    Died,
    Journal,
    ProcessId,
    ProcessSpec,
    Pulse,
    Raised,
    Returned,
    Runtime,
)
from workers.clock import Clock
from workers.errors import PlacementError, RefusedError
from workers.placement import (
    Member,
    MemberId,
    MemberState,
    Placement,
    Role,
    View,
)

Blueprint = Callable[[MemberId], tuple[ProcessSpec, ...]]

_log = structlog.get_logger("controller")


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """How many members of each role are wanted, and how experts are spread over them."""

    members: Mapping[Role, int]
    num_slots: int = 0
    floor: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    """Pace and patience of the controller, in seconds."""

    pulse_s: float = 0.5
    silence_s: float = 5.0
    backoff_s: float = 1.0
    max_failed_starts: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStatus:
    """One member as `expertmesh status` shows it."""

    member: Member
    phase: str
    pulses: tuple[Pulse, ...] = ()
    silent_s: float = 0.0
    suspect: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The cluster at one moment. `ready` says whether a request would be served now."""

    view: View
    members: tuple[MemberStatus, ...]
    ready: bool
    reasons: tuple[str, ...] = ()
    failure: str = ""


class Controller:
    """Keeps the wanted members alive, places experts on them and publishes Views."""

    def __init__(
        self,
        desired: Desired,
        placement: Placement,
        blueprints: Mapping[Role, Blueprint],
        *,
        runtime: Runtime,
        journal: Journal,
        clock: Clock,
        options: ControllerOptions,
    ) -> None:
        self._desired = desired
        self._target = placement
        self._blueprints = blueprints
        self._runtime = runtime
        self._journal = journal
        self._clock = clock
        self._options = options
        self._lives: dict[MemberId, Life] = {}
        self._next_incarnation: Counter[str] = Counter()
        self._failed_starts: Counter[Role] = Counter()
        self._not_before_s: dict[Role, float] = {}
        self._pulsed_s = clock.now_s()
        self._stopping = False
        self._failure = ""
        self._superseded = False
        self._view = View(journal.claim_term(), 0, (), self._published_placement())

    def tick(self) -> None:
        """Do one round: hear, decide, act, publish."""
        for event in self._runtime.poll():
            self._hear(event)
        if not self._stopping and not self._superseded:
            self._spawn_missing()
        self._advance()
        self._publish()
        self._ask_pulses()

    def stop(self) -> None:
        """Drain everybody, front doors first; `stopped` says when nothing is left."""
        self._stopping = True

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called and no process is left."""
        return self._stopping and not self._lives

    @property
    def view(self) -> View:
        """The newest published View."""
        return self._view

    def status(self) -> ClusterStatus:
        """Return the cluster as the controller knows it."""
        reasons = tuple(self._unready_reasons())
        return ClusterStatus(
            view=self._view,
            members=tuple(self._member_status(life) for life in self._lives.values()),
            ready=not reasons,
            reasons=reasons,
            failure=self._failure,
        )

    # What has happened

    def _hear(self, event: Returned | Raised | Died) -> None:
        life = self._lives.get(event.process.member)
        if life is None:
            return  # the end of a process whose member was given up before
        match event:
            case Returned(process, "pulse", Pulse() as pulse):
                self._hear_pulse(life, process, pulse)
            case Returned(process, method, value):
                if method == life.phase.value:
                    life.finish(process, value)
            case Raised(process, method, error):
                life.asked.discard(process)
                if method == life.phase.value:
                    self._end(life, f"{process}: {method}: {error}")
                else:
                    _log.warning("call failed", process=str(process), method=method, error=error)
            case Died(process, reason):
                self._end(life, f"{process}: {reason}", dead=process)
            case _:
                assert_never(event)

    def _hear_pulse(self, life: Life, process: ProcessId, pulse: Pulse) -> None:
        life.asked.discard(process)
        life.heard_s[process] = self._clock.now_s()
        life.pulses[process] = pulse
        if pulse.failure:
            self._end(life, f"{process}: {pulse.failure}")
        elif pulse.order < self._view.order:
            self._runtime.call(process, "adopt", self._view)  # it missed one

    def _end(self, life: Life, reason: str, dead: ProcessId | None = None) -> None:
        """Give a member up: the rest of its processes are ended and it leaves the View."""
        expected = self._stopping or life.phase is Phase.DRAIN
        born = life.phase is Phase.SERVE
        for process in life.processes:
            if process != dead:
                self._runtime.kill(process)
        del self._lives[life.member.id]
        if expected:
            return
        _log.error("member ended", member=str(life.member.id), phase=life.phase.value, why=reason)
        failed = 0 if born else self._failed_starts[life.role] + 1
        self._failed_starts[life.role] = failed
        wait_s = self._options.backoff_s * (2**failed - 1)
        self._not_before_s[life.role] = self._clock.now_s() + wait_s
        if failed >= self._options.max_failed_starts:
            self._failure = f"{life.role.value} failed to start {failed} times: {reason}"

    # What to do about it

    def _spawn_missing(self) -> None:
        for role, wanted in self._desired.members.items():
            if self._clock.now_s() < self._not_before_s.get(role, 0.0):
                continue
            taken = {life.member.id.name for life in self._lives.values() if life.role is role}
            names = (f"{role.value}-{i}" for i in range(wanted))
            for name in [n for n in names if n not in taken]:
                self._spawn(role, name)

    def _spawn(self, role: Role, name: str) -> None:
        self._next_incarnation[name] += 1
        # The term makes an incarnation unique over controllers; the count, within one.
        incarnation = self._view.term * 1_000_000 + self._next_incarnation[name]
        member = Member(
            id=MemberId(name, incarnation),
            role=role,
            state=MemberState.JOINING,
            num_slots=self._desired.num_slots if role is Role.EXPERT_WORKER else 0,
        )
        specs = self._blueprints[role](member.id)
        life = Life(member, tuple(spec.id for spec in specs))
        self._lives[member.id] = life
        for spec in specs:
            self._runtime.spawn(spec)
        self._enter(life, Phase.OPEN)

    def _advance(self) -> None:
        self._place_if_possible()
        for life in list(self._lives.values()):
            if self._stopping and self._may_drain(life):
                self._enter(life, Phase.DRAIN)
            elif life.between_phases:
                phase = life.next_phase()
                if phase is Phase.END:
                    self._end(life, "drained")
                elif phase is not Phase.LOAD or self._has_assignment(life):
                    self._enter(life, phase)

    def _may_drain(self, life: Life) -> bool:
        """Front doors drain first, then gateways, then workers."""
        if life.phase is Phase.DRAIN:
            return False
        order = [Role.FRONT_DOOR, Role.GATEWAY, Role.EXPERT_WORKER]
        before = order[: order.index(life.role)]
        return not any(other.role in before for other in self._lives.values())

    def _enter(self, life: Life, phase: Phase) -> None:
        serving = life.phase is Phase.SERVE
        life.enter(phase)
        if phase is Phase.DRAIN and not serving:
            self._end(life, "stopped before it served")
            return
        if phase is Phase.SERVE:
            self._failed_starts[life.role] = 0
        for process in life.awaited:
            self._runtime.call(process, phase.value, *self._phase_arguments(life, phase))

    def _phase_arguments(self, life: Life, phase: Phase) -> tuple[object, ...]:
        if phase is Phase.JOIN:
            return (life.opened[life.processes[0]].rendezvous,)
        if phase is Phase.LOAD and life.role is Role.EXPERT_WORKER:
            return (self._target.held_by(life.member.id),)
        return ()

    def _place_if_possible(self) -> None:
        """Give newly opened workers their experts, once all the wanted ones have opened."""
        workers = [w for w in self._lives.values() if w.role is Role.EXPERT_WORKER]
        new = [w for w in workers if w.phase is Phase.OPEN and not w.awaited]
        opening = [w for w in workers if w.phase is Phase.OPEN and w.awaited]
        if not new or (opening and not self._covered()):
            return  # what is lost goes to all that are coming, not to whoever is first
        slots = {w.member.id: w.member.num_slots for w in workers if w not in opening}
        try:
            self._target = place(
                self._target,
                slots,
                floor=self._desired.floor,
                receiving=frozenset(w.member.id for w in new),
            )
        except PlacementError as error:
            self._failure = str(error)

    def _covered(self) -> bool:
        alive = [w for w in self._lives if self._lives[w].role is Role.EXPERT_WORKER]
        return not self._target.uncovered(alive)

    def _has_assignment(self, life: Life) -> bool:
        return life.role is not Role.EXPERT_WORKER or bool(self._target.held_by(life.member.id))

    # What everybody is told

    def _publish(self) -> None:
        members = tuple(sorted((w.member for w in self._lives.values()), key=lambda m: m.id))
        if members == self._view.members or self._superseded:
            return  # placement follows the members' phases: it changes with them only
        view = replace(
            self._view,
            version=self._view.version + 1,
            members=members,
            placement=self._published_placement(),
        )
        try:
            self._journal.append(view)
        except RefusedError as error:
            self._superseded = True
            self._failure = str(error)
            return
        self._view = view
        for life in self._lives.values():
            for process in life.opened:
                self._runtime.call(process, "adopt", view)

    def _published_placement(self) -> Placement:
        """Return the replicas that are loaded: those on workers past their LOAD phase."""
        loaded = {
            member
            for member, life in self._lives.items()
            if life.phase in {Phase.START, Phase.SERVE, Phase.DRAIN}
        }
        kept = (
            (expert, tuple(r for r in replicas if r.worker in loaded))
            for expert, replicas in self._target.replicas.items()
        )
        return replace(self._target, replicas={e: replicas for e, replicas in kept if replicas})

    def _ask_pulses(self) -> None:
        if self._clock.now_s() - self._pulsed_s < self._options.pulse_s:
            return
        self._pulsed_s = self._clock.now_s()
        for life in self._lives.values():
            if life.phase in {Phase.SERVE, Phase.DRAIN}:
                for process in set(life.processes) - life.asked:
                    life.asked.add(process)
                    self._runtime.call(process, "pulse")

    # How it stands

    def _unready_reasons(self) -> list[str]:
        reasons = [self._failure] if self._failure else []
        for role, wanted in self._desired.members.items():
            lives = [w for w in self._lives.values() if w.role is role]
            serving = sum(w.phase is Phase.SERVE for w in lives)
            if serving < wanted:
                reasons.append(f"{role.value}: {serving} of {wanted} serve")
            reasons += [
                f"{process} is not ready"
                for life in lives
                if life.phase is Phase.SERVE
                for process in life.processes
                if process not in life.pulses or not life.pulses[process].ready
            ]
        missing = len(self._view.uncovered()) if self._desired.members[Role.EXPERT_WORKER] else 0
        if missing:
            reasons.append(f"{missing} experts have no serving replica")
        return reasons

    def _member_status(self, life: Life) -> MemberStatus:
        now_s = self._clock.now_s()
        silent_s = max((now_s - heard for heard in life.heard_s.values()), default=0.0)
        return MemberStatus(
            member=life.member,
            phase=life.phase.value,
            pulses=tuple(life.pulses[p] for p in life.processes if p in life.pulses),
            silent_s=silent_s,
            suspect=silent_s > self._options.silence_s,
        )
