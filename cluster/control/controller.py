"""The controller: hears what has happened, decides, and brings the cluster to what is wanted.

It is the one writer of Views. Nothing on the data path waits for it. One `tick` does one round and
never blocks, so that tests and the simulator call it directly. Who comes and goes is decided in
`staffing`, which replicas are loaded where in `assignment`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, assert_never

import structlog

from cluster.control.distributor import Distributor
from cluster.control.health import (
    is_alone,
    is_suspect,
    member_status,
    pool_status,
    stalled,
    unready,
)
from cluster.control.heritage import usable
from cluster.control.lifecycle import MAY_STAND_BY, PULSING, Life, Phase, adopted
from cluster.control.node_demand import NodeDemand
from cluster.control.options import ControllerOptions, Desired
from cluster.control.ports import (
    Actuator,
    Died,
    Journal,
    Leaving,
    ProcessId,
    ProcessSpec,
    Pulse,
    Raised,
    Record,
    Returned,
    Runtime,
    RuntimeEvent,
)
from cluster.control.replicas import Fingerprints, ReplicaBook
from cluster.control.rollout import next_to_leave, outdated
from cluster.control.scaling.autoscaler import Autoscaler
from cluster.control.staffing import (
    check_count,
    enough_workers,
    fewest_workers,
    need_of,
    slots_left,
    staff,
)
from cluster.control.status import ClusterStatus, PoolStatus, StepWatch
from workers.clock import Clock
from workers.dispatch.tally import LoadReport
from workers.errors import NotFoundError, RefusedError, UnavailableError
from workers.placement import NO_CELL, Member, MemberId, MemberState, Placement, Role, View
from workers.types import GatewayStats

Blueprint = Callable[[MemberId], tuple[ProcessSpec, ...]]

_INCARNATIONS = 1_000_000  # of one name within one term

_log = structlog.get_logger("controller")


class Controller:
    """Keeps the wanted members alive, places experts on them and publishes Views.

    With `resume` it goes on where the journal ends: members that an earlier controller started are
    taken over, and as many are wanted as were then, unless more or fewer are desired since. Where
    the journal tells nothing and yet something is `running`, it does nothing and says so.
    """

    def __init__(
        self,
        desired: Desired,
        model: Placement,
        blueprints: Mapping[Role, Blueprint],
        *,
        runtime: Runtime,
        journal: Journal,
        clock: Clock,
        options: ControllerOptions,
        actuator: Actuator | None = None,
        resume: bool = False,
        running: Collection[str] = (),
    ) -> None:
        self._desired = desired
        self._wanted = dict(desired.members)
        self._blueprints = blueprints
        self._runtime = runtime
        self._journal = journal
        self._clock = clock
        self._options = options
        self._lives: dict[MemberId, Life] = {}
        self._births: Counter[str] = Counter()
        self._failed_starts: Counter[Role] = Counter()
        self._not_before_s: dict[Role, float] = {}
        self._step_watches: dict[MemberId, StepWatch] = {}
        self._pulsed_s = clock.now_s()
        self._behind_s: dict[ProcessId, float] = {}  # since when a process holds an old View
        self._stopping = False
        self._failed_roles: dict[Role, str] = {}  # of which none has served since
        self._superseded = False
        self._rolling = False
        self._trouble = ""  # why nothing can be decided just now
        self._heard_term = 0  # the highest that members know of
        self._outgoing: list[tuple[ProcessId, Callable[[], None]]] = []  # done once journalled
        term = journal.claim_term()  # first: what an earlier controller writes after this is void
        left = journal.latest() if resume else None
        record, self._refusal = usable(left, desired, model, running)
        self._book = ReplicaBook(record.view.placement if record else model)
        self._fingerprints = Fingerprints()
        self._distributor = Distributor(self._book, model, desired, options, clock.now_s())
        self._actuator: Actuator = actuator or NodeDemand()
        self._autoscaler = Autoscaler(options.scaling)
        self._view = View(term, 0, (), self._book.placement())
        self._published: tuple[object, ...] = ()
        if record is not None:
            self._resume(record)

    def tick(self) -> None:
        """Do one round: hear, decide, journal, act; without a journal nothing is done."""
        if self._superseded or self._refusal:
            return
        try:
            is_kept = self._decide()
        except OSError as error:
            if not self._trouble:
                _log.exception("the journal cannot be used")
            self._trouble = f"the journal cannot be used: {error}; nothing is decided until it can"
            return
        self._trouble = ""
        if is_kept:
            self._send()
            self._provide()
            self._ask_pulses()
            self._send()

    def _decide(self) -> bool:
        """Hear, decide and journal; False when another controller has taken over."""
        if not self._still_leads():
            return False
        for event in self._runtime.poll():
            self._hear(event)
        self._rise_above(self._heard_term)
        if not self._stopping and not self._trouble:  # else it is long ago that anybody was heard
            self._roll()
            self._scale_by_load()
            self._staff()
            self._assign()
        self._advance()
        self._watch()
        return self._publish()

    def scale(self, role: Role, count: int) -> int:
        """Set how many members of a role are wanted; returns how many were before.

        Raises RefusedError when so many could not serve every expert, or are too many, and
        UnavailableError when it could not be journalled.
        """
        self._check_not_refusing()
        self._check_count(role, count)
        self._check_bounds(role, count)
        before = self._wanted[role]
        self._wanted[role] = count
        _log.info("scale", role=role.value, wanted=count, before=before)
        self._commit()
        return before

    def drain(self, name: str) -> MemberId:
        """Have one member leave for good, with one less wanted; a standby is replaced.

        Raises NotFoundError for a name that nobody has, and what `scale` does.
        """
        self._check_not_refusing()
        named = [x for x in self._lives.values() if name in {x.member.id.name, str(x.member.id)}]
        for life in named:
            if not life.leaving:
                if life.enlisted:
                    self._check_count(
                        life.role, self._wanted[life.role] - 1, without=life.member.id
                    )
                    self._check_bounds(life.role, self._wanted[life.role] - 1)
                    self._wanted[life.role] -= 1
                self._dismiss(life, "drained by an operator")
                self._commit()
                return life.member.id
        if named:
            raise NotFoundError(f"{name} is leaving already")
        raise NotFoundError(f"no member {name}, or it has gone; `expertmesh status` lists them")

    def rollout(self) -> int:
        """Begin to replace, one by one, the members with outdated settings; returns how many."""
        self._check_not_refusing()
        count = len(outdated(self._lives.values(), self._desired.settings))
        self._rolling = count > 0
        _log.info("rollout", outdated=count)
        self._commit()
        return count

    def stop(self) -> None:
        """Drain everybody, front doors first; `stopped` says when nothing is left."""
        self._stopping = True

    def close(self) -> None:
        """Ask for no nodes any more; what was asked for last stays."""
        self._actuator.close()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called and no process is left."""
        return self._stopping and not self._lives

    @property
    def superseded(self) -> bool:
        """Whether another controller has taken over: this one does nothing any more."""
        return self._superseded

    @property
    def view(self) -> View:
        """The newest published View."""
        return self._view

    def status(self) -> ClusterStatus:
        """Return the cluster as the controller knows it."""
        now_s, last = self._clock.now_s(), self._distributor.last_rebalance
        reasons = tuple(self._unready_reasons(now_s))
        return ClusterStatus(
            view=self._view,
            members=tuple(
                member_status(life, self._desired, self._options, now_s)
                for life in self._lives.values()
            ),
            ready=not reasons,
            reasons=reasons,
            failure=self._failure(),
            refuses=bool(self._refusal),
            pools=tuple(self._pool(role) for role in self._wanted),
            rebalancing_s=self._distributor.lacking_s(now_s),
            replicas_loading=self._book.num_loading,
            replicas_moving=self._distributor.num_moves,
            last_rebalance=last,
            last_rebalance_age_s=now_s - last.at_s if last else 0.0,
            allows_chaos=self._options.allow_chaos,
            rolling=self._rolling,
            scales=self._autoscaler.pools(self._fewest()),
            scaled=tuple((now_s - change.at_s, change) for change in self._autoscaler.changes),
        )

    # What has happened

    def _still_leads(self) -> bool:
        if not self._journal.is_leading():
            self._superseded = True
            _log.error("superseded", term=self._view.term)
        return not self._superseded

    def _hear(self, event: RuntimeEvent) -> None:
        life = self._lives.get(event.process.member)
        if life is None:
            return  # the end of a process whose member was given up before
        match event:
            case Returned(process, "pulse", Pulse() as pulse):
                self._hear_pulse(life, process, pulse)
            case Returned(process, method, value):
                self._hear_value(life, process, method, value)
            case Raised(process, method, error):
                self._hear_error(life, process, method, error)
            case Died(process, reason):
                self._end(life, f"{process}: {reason}", dead=process)
            case Leaving(_, reason):
                life.missed = False
                if not life.leaving:
                    self._dismiss(life, reason)
            case _:
                assert_never(event)

    def _hear_value(self, life: Life, process: ProcessId, method: str, value: Any) -> None:  # noqa: ANN401
        if method == Phase.LOAD.value and life.role is Role.EXPERT_WORKER:
            life.loads_since_s = None
            self._book.finish(life.member.id, done=True)
            strange = self._fingerprints.compare(life.member.id, value or {})
            if strange:
                self._end(life, strange)
                return
        if method == life.phase.value:
            life.finish(process, value)

    def _hear_pulse(self, life: Life, process: ProcessId, pulse: Pulse) -> None:
        life.asked.discard(process)
        life.heard_s[process] = self._clock.now_s()
        if life.missed:
            life.leaving = life.missed = False
            _log.info("member is back", member=str(life.member.id))
        life.pulses[process] = replace(pulse, load=None)
        if isinstance(pulse.load, LoadReport):
            self._distributor.hear(life.member.cell, pulse.load, self._clock.now_s())
        if isinstance(pulse.stats, GatewayStats):
            watch = self._step_watches.setdefault(life.member.id, StepWatch(self._options.stall_s))
            watch.note(pulse.stats, self._clock.now_s())
        life.shares.note(pulse.stats, self._clock.now_s())
        if pulse.failure:
            self._end(life, f"{process}: {pulse.failure}")
        elif pulse.order[0] > self._view.term:
            self._heard_term = max(self._heard_term, pulse.order[0])
        elif pulse.order < self._view.order:
            self._behind_s.setdefault(process, self._clock.now_s())
            self._call(process, "adopt", self._view)  # it missed one
        else:
            self._behind_s.pop(process, None)

    def _hear_error(self, life: Life, process: ProcessId, method: str, error: str) -> None:
        life.asked.discard(process)
        if method == life.phase.value:
            self._end(life, f"{process}: {method}: {error}")
            return
        _log.warning("call failed", process=str(process), method=method, error=error)
        if method == Phase.LOAD.value:
            life.loads_since_s = None
            self._book.finish(life.member.id, done=False)
            self._distributor.hold_off(life.member.id, self._clock.now_s())

    def _rise_above(self, term: int) -> None:
        """Go beyond a term that members have heard of: the journal that knew it was lost."""
        if term <= self._view.term or not self._still_leads():
            return
        _log.error("members know a higher term than the journal", term=term)
        self._view = replace(self._view, term=self._journal.claim_term(above=term))
        self._published = ()

    def _end(self, life: Life, reason: str, dead: ProcessId | None = None) -> None:
        """Give a member up: the rest of its processes are ended and it leaves the View."""
        expected = self._stopping or life.phase is Phase.DRAIN or life.leaving
        born = life.phase in {Phase.SERVE, Phase.STANDBY}
        for process in life.processes:
            if process != dead:
                self._runtime.kill(process)
        self._outgoing = [entry for entry in self._outgoing if entry[0] not in life.processes]
        del self._lives[life.member.id]
        self._book.forget(life.member.id)
        self._fingerprints.forget(life.member.id)
        self._step_watches.pop(life.member.id, None)
        self._distributor.forget(life.member.id)
        for process in life.processes:
            self._behind_s.pop(process, None)
        if expected:
            return
        _log.error("member ended", member=str(life.member.id), phase=life.phase.value, why=reason)
        failed = 0 if born else self._failed_starts[life.role] + 1
        self._failed_starts[life.role] = failed
        wait_s = self._options.backoff_s * (2 ** min(failed, 6) - 1)
        self._not_before_s[life.role] = self._clock.now_s() + wait_s
        if failed >= self._options.max_failed_starts:
            self._failed_roles[life.role] = (
                f"{life.role.value} failed to start {failed} times: {reason}"
            )

    def _resume(self, record: Record) -> None:
        """Take over what an earlier controller left; whoever was half started begins anew."""
        now_s = self._clock.now_s()
        changed = {r: n for r, n in self._wanted.items() if record.configured.get(r, n) != n}
        self._wanted = {**self._wanted, **record.wanted, **changed}
        self._rolling = record.rolling
        self._view = replace(record.view, term=self._view.term)
        for member in record.view.members:
            life = adopted(member, self._processes_of(member), now_s)
            for process in self._processes_of(member):
                self._runtime.adopt(process, member.node_of(process.rank))
                if life is None:
                    self._runtime.kill(process)
            if life is None:
                self._book.forget(member.id)
                continue
            life.leaving = member.id in record.leaving
            life.relieved = member.id in record.relieved
            if not life.enlisted:
                life.member = replace(life.member, cell=self._first_cell(life.role))
            self._lives[member.id] = life
        _log.info("took over", members=len(self._lives), term=self._view.term)

    def _processes_of(self, member: Member) -> tuple[ProcessId, ...]:
        """Return the processes of a member that an earlier controller started.

        A gateway may have had another size: one that serves has told where each rank's store is.
        """
        now = len(self._blueprints[member.role](member.id))
        then = len(member.stores)
        count = then or now if member.serves else max(then, now)
        return tuple(ProcessId(member.id, rank) for rank in range(count))

    # What to do about it

    def _roll(self) -> None:
        """Let the next outdated member go, once whoever went before has been replaced."""
        if not self._rolling:
            return
        lives = self._lives.values()
        member = next_to_leave(lives, self._desired.settings, self._wanted)
        if member is not None:
            self._lives[member].relieved = True
            self._dismiss(self._lives[member], "replaced by one with newer settings")
        self._rolling = bool(outdated(lives, self._desired.settings))

    def _scale_by_load(self) -> None:
        """Want more or fewer members where their load says so."""
        changes = self._autoscaler.consider(
            self._lives.values(), self._wanted, self._fewest(), self._clock.now_s()
        )
        for role, change in changes.items():
            _log.info(
                "scale", role=role.value, wanted=change.after, before=change.before, why=change.why
            )
            self._wanted[role] = change.after

    def _provide(self) -> None:
        """Say which nodes are needed; whoever provides them looks at that in its own time."""
        by_role = {
            role: [w for w in self._lives.values() if w.role is role] for role in self._wanted
        }
        self._actuator.provide(
            [
                need_of(role, lives, self._count_of(role) + self._desired.standby.get(role, 0))
                for role, lives in by_role.items()
            ]
        )

    def _staff(self) -> None:
        for role in self._wanted:
            standby, cells = self._desired.standby.get(role, 0), self._cells_of(role)
            orders = staff(role, self._lives.values(), self._count_of(role), standby, cells)
            for member, cell in orders.enlist:
                self._lives[member].enlist(cell)
            for member in orders.dismiss:
                self._dismiss(self._lives[member], "one less is wanted")
            if self._clock.now_s() >= self._not_before_s.get(role, 0.0):
                for name in orders.start:
                    self._spawn(role, name)

    def _spawn(self, role: Role, name: str) -> None:
        self._births[name] += 1
        # The term makes an incarnation unique over controllers; the count, within one.
        incarnation = self._view.term * _INCARNATIONS + self._births[name]
        member = Member(
            id=MemberId(name, incarnation),
            role=role,
            state=MemberState.JOINING,
            num_slots=self._desired.num_slots if role is Role.EXPERT_WORKER else 0,
            settings=self._desired.settings.get(role, ""),
            cell=self._first_cell(role),
        )
        specs = self._blueprints[role](member.id)
        life = Life(member, tuple(spec.id for spec in specs))
        life.enlisted = role not in MAY_STAND_BY
        self._lives[member.id] = life
        for spec in specs:
            self._outgoing.append((spec.id, partial(self._runtime.spawn, spec)))
        self._enter(life, Phase.OPEN)

    def _count_of(self, role: Role) -> int:
        """Return how many of a role are to serve: as wanted, or more while those are too small."""
        wanted, model = self._wanted[role], self._book.model
        if role is not Role.EXPERT_WORKER or not any(map(self._book.has_any, self._lives)):
            return wanted
        return enough_workers(
            self._lives.values(), wanted, self._desired, model.num_layers * model.num_experts
        )

    def _dismiss(self, life: Life, reason: str) -> None:
        """Let a member go; it drains when nobody needs it any more."""
        life.leaving = True
        _log.info("member leaves", member=str(life.member.id), why=reason)

    def _assign(self) -> None:
        """Begin the loads that are due."""
        wanted = self._count_of(Role.EXPERT_WORKER)
        if not wanted:
            return
        due = self._distributor.due(self._workers(), wanted, self._clock.now_s())
        for member, loads in due.items():
            batch = self._book.begin(member, loads)
            life = self._lives[member]
            if life.phase is Phase.STANDBY:
                self._enter(life, Phase.LOAD, batch)
            elif batch:
                life.loads_since_s = self._clock.now_s()
                self._call(life.processes[0], Phase.LOAD.value, batch)

    def _advance(self) -> None:
        for life in list(self._lives.values()):
            if self._may_drain(life):
                self._enter(life, Phase.DRAIN)
            elif life.between_phases or life.is_called_up:
                phase = life.next_phase()
                if phase is Phase.END:
                    self._end(life, "drained")
                else:
                    self._enter(life, phase)

    def _may_drain(self, life: Life) -> bool:
        """Whether a member may go now; all go at the end, front doors first, workers last."""
        if life.phase is Phase.DRAIN:
            return False
        if self._stopping:
            order = [Role.FRONT_DOOR, Role.GATEWAY, Role.EXPERT_WORKER]
            before = order[: order.index(life.role)]
            return not any(other.role in before for other in self._lives.values())
        if not life.leaving or life.phase is not Phase.SERVE:
            return life.leaving
        replaced = self._pool(life.role).serving >= self._wanted[life.role]
        if life.role is not Role.EXPERT_WORKER or (life.relieved and not replaced):
            return replaced
        now_s = self._clock.now_s()
        staying = [
            w.member.id
            for w in self._workers()
            if w.phase is Phase.SERVE
            and not w.leaving
            and w.member.cell == life.member.cell
            and not is_suspect(w, self._options, now_s)
        ]
        moved = self._distributor.is_whole(life.member.cell, self._workers())
        return moved and self._book.covers(life.member.id, staying)

    def _enter(self, life: Life, phase: Phase, *arguments: object) -> None:
        serving = life.phase is Phase.SERVE
        life.enter(phase, self._clock.now_s())
        if phase is Phase.DRAIN and not serving:
            self._end(life, "stopped before it served")
            return
        if phase is Phase.SERVE:
            self._failed_starts[life.role] = 0
            self._failed_roles.pop(life.role, None)
        if phase is Phase.JOIN:
            arguments = (life.opened[life.processes[0]].rendezvous,)
        for process in sorted(life.awaited):
            self._call(process, phase.value, *arguments)

    def _watch(self) -> None:
        """Give up whoever is silent, and whoever never gets on; first who is needed is replaced."""
        now_s = self._clock.now_s()
        if self._trouble:  # nobody was asked anything meanwhile
            for life in self._lives.values():
                life.start_over(now_s)
            return
        alone = is_alone(self._lives.values(), self._options, now_s)
        for life in list(self._lives.values()):
            silent_s, loading_s = life.silent_s(now_s), life.loading_s(now_s)
            is_lost = silent_s > self._options.lost_s and not alone
            is_stuck = loading_s > self._options.phase_s
            if is_lost or is_stuck:
                lost = f"silent for {silent_s:.1f} s"
                reason = lost if is_lost else f"loads for {loading_s:.0f} s"
                if self._is_spare(life, now_s):
                    self._end(life, reason)
                elif not life.leaving:
                    life.missed = is_lost
                    self._dismiss(life, f"{reason}; others load what it alone holds")
            elif life.awaited and now_s - life.since_s > self._options.phase_s:
                self._end(life, f"{life.phase.value} took over {self._options.phase_s:g} s")

    def _is_spare(self, life: Life, now_s: float) -> bool:
        """Whether others have loaded all that a member has, so that its loss parks no row."""
        if life.role is not Role.EXPERT_WORKER:
            return True
        sound = [
            w.member.id
            for w in self._workers()
            if w.phase is Phase.SERVE and not is_suspect(w, self._options, now_s)
        ]
        return self._book.covers(life.member.id, sound)

    def _check_count(self, role: Role, count: int, without: MemberId | None = None) -> None:
        model, desired = self._book.model, self._desired
        check_count(
            role,
            count,
            wanted=self._wanted,
            desired=desired,
            num_experts=model.num_layers * model.num_experts,
            num_slots=slots_left(self._lives.values(), count, desired, without=without),
        )

    def _check_bounds(self, role: Role, count: int) -> None:
        """Refuse a number that load would change back at once."""
        bounds = self._autoscaler.bounds(role, self._fewest().get(role, 1))
        if bounds is not None and not bounds[0] <= count <= bounds[1]:
            section = "experts" if role is Role.EXPERT_WORKER else f"{role.value}s"
            raise RefusedError(
                f"{count} {role.plural}: the number follows load between {bounds[0]} and "
                f"{bounds[1]}; change autoscaler.{section}.min or max and apply"
            )

    def _fewest(self) -> Mapping[Role, int]:
        """Return how many of a role must be there whatever the load."""
        model = self._book.model
        num_experts = model.num_layers * model.num_experts
        return {
            Role.EXPERT_WORKER: fewest_workers(self._desired, num_experts),
            Role.GATEWAY: self._desired.cells,
        }

    # What everybody is told

    def _call(self, process: ProcessId, method: str, *arguments: object) -> None:
        def call() -> None:
            self._runtime.call(process, self._view.term, method, *arguments)

        self._outgoing.append((process, call))

    def _send(self) -> None:
        """Do what was decided, now that the next controller would know of it."""
        outgoing, self._outgoing = self._outgoing, []
        for _, act in outgoing:
            act()

    def _check_not_refusing(self) -> None:
        """Raise RefusedError where nothing may be decided: the journal stays as it was found."""
        if self._refusal:
            raise RefusedError(self._refusal)

    def _commit(self) -> None:
        """Journal what an operator has asked for; raises UnavailableError where that fails."""
        try:
            is_kept = self._publish()
        except OSError as error:
            why = f"the journal cannot be used: {error}; what was asked for is done once it can"
            raise UnavailableError(why) from error
        if not is_kept:
            raise UnavailableError("another controller has just taken over: ask again")
        self._send()

    def _publish(self) -> bool:
        """Journal and publish a View if anything that it or its record says has changed.

        Returns False, and nothing may be done, when another controller has taken over.
        """
        members = tuple(sorted((w.member for w in self._lives.values()), key=lambda m: m.id))
        leaving = frozenset(w.member.id for w in self._lives.values() if w.leaving)
        relieved = frozenset(w.member.id for w in self._lives.values() if w.relieved)
        wanted = tuple(self._wanted.items())
        state = (members, leaving, self._book.version, wanted, self._rolling, relieved)
        if self._superseded:
            return False
        if state == self._published:
            return True
        placement = self._view.placement
        if not self._published or state[2] != self._published[2]:
            placement = self._book.placement()
        view = replace(
            self._view, version=self._view.version + 1, members=members, placement=placement
        )
        try:
            self._journal.append(
                Record(
                    view,
                    dict(self._wanted),
                    leaving,
                    configured=dict(self._desired.members),
                    rolling=self._rolling,
                    fixed=self._desired.fixed,
                    relieved=relieved,
                )
            )
        except RefusedError:
            self._still_leads()
            return False
        self._published = state
        self._view = view
        for life in self._lives.values():
            for process in life.opened:
                self._call(process, "adopt", view)
        return True

    def _ask_pulses(self) -> None:
        if self._clock.now_s() - self._pulsed_s < self._options.pulse_s:
            return
        self._pulsed_s = self._clock.now_s()
        for life in self._lives.values():
            if life.phase in PULSING:
                for process in sorted(set(life.processes) - life.asked):
                    life.asked.add(process)
                    self._call(process, "pulse")

    # How it stands

    def _workers(self) -> Collection[Life]:
        return [w for w in self._lives.values() if w.role is Role.EXPERT_WORKER]

    def _failure(self) -> str:
        """Say why waiting would not help; "" while it may."""
        if self._superseded:
            return f"the controller of term {self._view.term} is superseded: it must stop"
        if self._refusal:
            return self._refusal
        failed = next(iter(self._failed_roles.values()), "")
        return failed or ("" if self._book.held() else self._distributor.shortage)

    def _unready_reasons(self, now_s: float) -> list[str]:
        problems = (self._failure(), self._trouble, self._distributor.shortage)
        reasons = [problem for problem in dict.fromkeys(problems) if problem]
        reasons += [
            f"{pool.role.value}: {pool.serving} of {pool.wanted} serve"
            for pool in (self._pool(role) for role in self._wanted)
            if pool.serving < pool.wanted
        ]
        reasons += unready(self._lives.values(), self._options, now_s)
        if trouble := self._actuator.trouble():
            reasons.append(f"nodes: {trouble}")
        reasons += stalled(self._step_watches, self._behind_s, self._options, now_s)
        lacking_s = self._distributor.lacking_s(now_s)
        if lacking_s > self._options.lacking_s:
            reasons.append(f"experts lack copies for {lacking_s:.0f} s")
        missing = len(self._view.uncovered()) if self._wanted[Role.EXPERT_WORKER] else 0
        if missing:
            reasons.append(f"{missing} experts have no serving replica")
        return reasons

    def _cells_of(self, role: Role) -> int:
        """Return among how many cells the members of a role are shared out."""
        return 1 if role is Role.FRONT_DOOR else self._desired.cells

    def _first_cell(self, role: Role) -> int:
        """Return the cell of a member that has not been called up."""
        return 0 if self._cells_of(role) == 1 else NO_CELL

    def _pool(self, role: Role) -> PoolStatus:
        return pool_status(role, self._lives.values(), self._wanted[role])
