"""Simulated processes: workers with production slots, gateways with the production dispatcher."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from cluster.control.fence import Fence
from cluster.control.ports import Opened, ProcessId, Pulse
from tests.chaos.lab.links import Network, Rows, SimInbox, SimLink, SimLinks
from tests.chaos.lab.simulator import SimCondition, Simulator
from workers.dispatch.exchange import LinkDispatcher
from workers.dispatch.header import Flag, Header, Kind, Status
from workers.dispatch.options import DispatchOptions
from workers.dispatch.suspects import PROOFS
from workers.expert.batching import OTHERS_SETTLE_S, CallQueue
from workers.expert.slots import NO_SLOT, SlotTable
from workers.placement import ExpertId, MemberId, Role, View

EMPTY = None
NO_VALUES, NO_MASKS = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.uint32)
LEASE_S = 5.0
POISON = 1000.0  # a row of it ends the worker that computes it
LONGEST_DEADLINE_S = 3.0  # that slow workers may teach; beyond it something is wrong


class ViolationError(AssertionError):
    """An invariant was broken; the message begins with its name."""


def output(layer: int, expert: int, x: float) -> float:
    """Return what an expert makes of a row: whole numbers, so that every sum is exact."""
    return float((int(x) % 13 + 1) * (1 + expert) + 40 * layer)


class SimCall(NamedTuple):
    """A call that a worker has received."""

    link: SimLink
    header: Header
    rows: Rows

    @property
    def arrived_s(self) -> float:
        return 0.0  # nobody asks for ages here

    @property
    def batch_key(self) -> tuple[int, int]:
        return self.header.layer, self.header.flags

    @property
    def is_alone(self) -> bool:
        return bool(self.header.flags & Flag.ALONE)

    @property
    def is_settled(self) -> bool:
        return self.link.settled == self.header.message_id or self.link.closed


class SimProcess:
    """What every simulated process has: a life, a fence, the newest View."""

    def __init__(self, simulator: Simulator, process: ProcessId) -> None:
        self.simulator = simulator
        self.process = process
        self.member = process.member
        self.is_alive = True
        self.is_frozen = False
        self.order = (0, 0)
        self.fence = Fence()
        self._highest_term = 0
        self._held_back: deque[Callable[[], None]] = deque()

    def handle(self, term: int, method: str, *arguments: object) -> object:
        """Answer a call of a controller; raises what the method raises."""
        self.fence.admit(term)
        if term < self._highest_term:
            raise ViolationError(f"I5: {self.member} obeys term {term} after {self._highest_term}")
        self._highest_term = term
        return getattr(self, method)(*arguments)

    def soon(self, action: Callable[[], None]) -> None:
        """Do something in this process, when it next runs."""
        if self.is_frozen:
            self._held_back.append(action)
        elif self.is_alive:
            action()

    def thaw(self) -> None:
        self.is_frozen = False
        while self._held_back and self.is_alive and not self.is_frozen:
            self._held_back.popleft()()

    def adopt(self, view: View) -> None:
        if view.order > self.order:
            self.order = view.order

    def pulse(self) -> Pulse:
        return Pulse(order=self.order, ready=True)


class SimWorker(SimProcess):
    """A worker: leases and slots are the production's, the weights are names of experts."""

    def __init__(
        self,
        simulator: Simulator,
        process: ProcessId,
        *,
        num_slots: int,
        num_layers: int,
        num_experts: int,
        node: str,
        end: Callable[[ProcessId], None],
    ) -> None:
        super().__init__(simulator, process)
        self.slots = SlotTable(
            num_slots=num_slots,
            num_layers=num_layers,
            num_experts=num_experts,
            clock=simulator,
            changed=SimCondition(simulator),
        )
        self.links: list[SimLink] = []
        self.slow_until_s = 0.0
        self.alone: float | None = None  # the row that it computes and nothing else
        self._node = node
        self._end = end
        self._memory: list[ExpertId | None] = [EMPTY] * num_slots
        self._read: list[set[int]] = []  # slots of the computations under way
        self._waiting: CallQueue[SimCall] = CallQueue()
        self._computing = self._loading = self._draining = False
        self._started = False
        self._gateways: frozenset[MemberId] = frozenset()
        self._last_call_s = 0.0

    def takes_links_of(self, gateway: MemberId) -> bool:
        return self.is_alive and not self.is_frozen and gateway in self._gateways

    def remembers(self, expert: ExpertId, slot: int) -> bool:
        """Whether the slot's memory holds the expert's weights."""
        return self._memory[slot] == expert

    # What the controller calls.

    def open(self) -> Opened:
        return Opened(pid=1, node=self._node)

    def start(self) -> None:
        self._started = True

    def adopt(self, view: View) -> None:
        super().adopt(view)
        if view.order == self.order:
            known = self._gateways & {m.id for m in view.with_role(Role.GATEWAY)}
            callers = {m.id for m in view.callers_of(self.member) if m.stores}
            self._gateways = frozenset(known | callers)

    def load(self, assignment: dict[ExpertId, int]) -> None:
        while self._loading:  # one at a time, as the production's lock has it
            self.simulator.sleep(0.01)
        self._loading = True
        try:
            held = self.slots.held()
            for expert, slot in sorted(assignment.items(), key=lambda item: item[1]):
                if held.get(expert) != slot:
                    self._load_one(expert, slot)
        finally:
            self._loading = False

    def _load_one(self, expert: ExpertId, slot: int) -> None:
        def write() -> None:
            self._check_unread(slot)
            self._memory[slot] = EMPTY
            self.simulator.sleep(self.simulator.draw.uniform(0.0005, 0.004))
            self._check_unread(slot)
            self._memory[slot] = expert

        self.slots.overwrite(
            slot,
            expert,
            write=write,
            verify=lambda: self._memory[slot] == expert,
            timeout_s=LEASE_S,
        )

    def _check_unread(self, slot: int) -> None:
        if any(slot in read for read in self._read):
            raise ViolationError(f"I3: {self.member} writes slot {slot} while it is being read")

    def drain(self) -> None:
        self._draining = True
        while self._waiting or self.simulator.now_s() - self._last_call_s < 0.2:
            self.simulator.sleep(0.05)
        self.is_alive = False

    def disown(self, length_s: float) -> None:
        """Deny, for a while, some experts that the View places here."""
        draw, held = self.simulator.draw, dict(self.slots.held())
        for expert in draw.sample(sorted(held), (len(held) + 1) // 2):
            self._deny(expert, held[expert], length_s)

    def _deny(self, expert: ExpertId, slot: int, length_s: float) -> None:
        def own_again() -> None:
            if self._memory[slot] == expert and slot not in self.slots.held().values():
                self.slots._map(slot, expert)

        self.slots._expert_of.pop(slot)
        self.slots._change(expert, NO_SLOT)
        self.simulator.after(length_s, own_again)

    # What gateways send.

    def receive(self, link: SimLink, header: Header, rows: Rows) -> None:
        def take() -> None:
            if header.kind == Kind.SETTLED:
                link.settled = header.message_id
            else:
                self._last_call_s = self.simulator.now_s()
                self._waiting.put(SimCall(link, header, rows))
            self._go_on()

        if not link.closed:
            self.soon(take)

    def _go_on(self) -> None:
        """Compute what is next, if it may begin; else look again when it may at last."""
        if self._computing or not self._started:
            return
        if self._waiting.has_next(self.simulator.now_s()):
            self._compute()
        elif self._waiting:
            self.simulator.after(OTHERS_SETTLE_S, lambda: self.soon(self._go_on))

    def _compute(self) -> None:
        """Take what is next, hold a lease for as long as it takes, and answer."""
        calls = self._waiting.take(self.simulator.now_s())
        if not calls:  # whoever sent it is gone
            self._go_on()
            return
        self._computing = True
        if calls[0].is_alone:
            link, header, _ = calls[0]
            link.answer(header._replace(kind=Kind.BEGUN, num_rows=0), NO_VALUES, NO_MASKS)
            self.alone = float(calls[0].rows.values[0])
        lease = self.slots.lease()
        found = [lease.slots_LF[h.layer].take(r.ids) for _, h, r in calls]
        read = {int(s) for slots in found for s in slots.ravel() if s != NO_SLOT}
        self._read.append(read)
        slow = self.simulator.now_s() < self.slow_until_s
        takes_s = self.simulator.draw.choice((0.001, 0.06, 0.2, 0.4)) if slow else 0.001

        def finish() -> None:
            if any((rows.values == POISON).any() for _, _, rows in calls):
                self.simulator.note(f"{self.member} ends by poison, alone: {calls[0].is_alone}")
                self._end(self.process)
                return
            for (link, header, rows), slots in zip(calls, found, strict=True):
                self._answer(link, header, rows, slots)
            self._read.remove(read)
            self.slots.give_back(lease)
            self._computing = False
            self.alone = None
            self._go_on()

        self.simulator.after(takes_s, lambda: self.soon(finish))

    def _answer(self, link: SimLink, header: Header, rows: Rows, slots: Any) -> None:
        num_rows, top_k = rows.ids.shape
        values = np.zeros(num_rows, dtype=np.float32)
        masks = np.zeros(num_rows, dtype=np.uint32)
        for row in range(num_rows):
            for k in range(top_k):
                expert = int(rows.ids[row, k])
                if expert < 0 or slots[row, k] == NO_SLOT:
                    continue
                held = self._memory[slots[row, k]]
                if held != ExpertId(header.layer, expert):
                    raise ViolationError(f"I3: {self.member} computes {held} for expert {expert}")
                x = float(rows.values[row])
                values[row] += float(rows.weights[row, k]) * output(header.layer, expert, x)
                masks[row] |= np.uint32(1 << k)
        kind = Kind.REPLY if (masks == rows.masks).all() else Kind.STALE
        status = Status.DRAINING if self._draining else Status.OK
        link.answer(header._replace(kind=kind, status=status), values, masks)


class SimGateway(SimProcess):
    """A gateway: steps of one dispatched layer each, through the production dispatcher."""

    def __init__(
        self,
        simulator: Simulator,
        process: ProcessId,
        *,
        net: Network,
        find: Callable[[MemberId], Any],
        num_layers: int,
        num_experts: int,
        num_steps: int,
        options: DispatchOptions,
        num_ended_alone: Callable[[float], int],
    ) -> None:
        super().__init__(simulator, process)

        def open_links(*arguments: Any, **more: Any) -> Any:
            return SimLinks(*arguments, **more, net=net, find=find)

        self.dispatcher = LinkDispatcher(
            self.member,
            0,
            shape=net.shape,
            options=options,
            host="sim",
            clock=simulator,
            inbox=SimInbox(simulator),
            open_links=open_links,
        )
        self.links: SimLinks = self.dispatcher._links  # type: ignore[assignment]
        self._take_in = self.dispatcher._take_in
        self.dispatcher._take_in = self._watched_take_in  # type: ignore[method-assign]
        self.steps_done = 0
        self.num_poisoned = 0  # of the next steps, those that have a row of it
        self.step_since_s = 0.0
        self.num_steps = num_steps
        self._num_ended_alone = num_ended_alone
        self.view: View | None = None
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._adopted = (0, 0)

    def _watched_take_in(self, arrived: Any) -> None:
        """See that no reply of a closed incarnation becomes part of a result."""
        accepted = sum(len(c.state.accepted) for c in self.dispatcher._outbox.calls)
        self._take_in(arrived)
        now = sum(len(c.state.accepted) for c in self.dispatcher._outbox.calls)
        if now > accepted and arrived.opened.link.closed:
            raise ViolationError(
                f"I2: {self.member} uses a reply of a closed link to {arrived[0].worker}"
            )

    @property
    def deadline_s(self) -> float:
        """The longest that a call under way may take before its worker is suspect.

        Workers that were slow lately, and calls before it, have taught it to wait.
        """
        allowed_s = [0.0]
        for call in self.dispatcher._outbox.calls:
            for attempt in call.state.outstanding.values():
                peer = self.links.peers.get(attempt.worker)
                if peer is not None and not peer.suspect:
                    allowed_s.append(attempt.deadline_s - attempt.sent_s)
        return min(max(allowed_s), LONGEST_DEADLINE_S)

    @property
    def is_done(self) -> bool:
        return self.steps_done >= self.num_steps

    def open(self) -> Opened:
        return Opened(pid=1, node="gateway", store="sim:0")

    def join(self, rendezvous: object) -> None:
        del rendezvous

    def load(self) -> None:
        return None

    def pulse(self) -> Pulse:
        return Pulse(order=self.order, ready=True, load=self.dispatcher.take_load())

    def start(self) -> None:
        self.simulator.start(self._steps)

    def adopt(self, view: View) -> None:
        super().adopt(view)
        self.dispatcher.adopt(view)
        order = self.dispatcher._roster.order
        if order < self._adopted:
            raise ViolationError(f"I5: {self.member} went from View {self._adopted} to {order}")
        if order == view.order:
            self.view = view
        self._adopted = order

    def _steps(self) -> None:
        draw = self.simulator.draw
        while not self.is_done:
            self.simulator.sleep(draw.choice((0.0, 0.01, 0.1, 0.25)))
            self.step_since_s = self.simulator.now_s()
            self._step(draw.randrange(self._num_layers), draw.randrange(1, 4))
            self.step_since_s = 0.0
            self.steps_done += 1

    def _step(self, layer: int, num_rows: int) -> None:
        draw = self.simulator.draw
        if self.num_poisoned:
            num_rows = 3
        ids = [draw.sample(range(self._num_experts), 2) for _ in range(num_rows)]
        weights = [[draw.randrange(1, 8) for _ in range(2)] for _ in range(num_rows)]
        x: list[float] = [draw.randrange(1, 1000) for _ in range(num_rows)]
        if self.num_poisoned:
            self.num_poisoned -= 1
            x[1] = POISON
            ids = ids[:1] * num_rows  # so another one is computed alone just before it
        handle = self.dispatcher.dispatch(
            layer,
            torch.tensor(x, dtype=torch.float32)[:, None],
            torch.tensor(ids),
            torch.tensor(weights, dtype=torch.float32),
        )
        y = self.dispatcher.combine(handle)[:, 0].tolist()
        if any(self._num_ended_alone(x[row]) < PROOFS for row in handle.given_up):
            raise ViolationError(f"I1: {self.member} gave up a row that ends nobody")
        if handle.given_up:
            return  # none of its sums counts
        for row in range(num_rows):
            due = sum(
                w * output(layer, e, x[row]) for e, w in zip(ids[row], weights[row], strict=True)
            )
            if y[row] != due:
                raise ViolationError(f"I1: {self.member} got {y[row]} for a row, {due} was due")
