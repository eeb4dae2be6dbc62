"""A runtime without processes: calls are answered by a script, deaths come when a test says so."""

from collections.abc import Callable

from cluster.control.ports import (
    Died,
    Leaving,
    Opened,
    ProcessId,
    ProcessSpec,
    Pulse,
    Raised,
    Record,
    Returned,
    RuntimeEvent,
)
from workers.errors import RefusedError
from workers.placement import View


class FakeRuntime:
    """Answers every call at the next poll; `answer` may be replaced per method."""

    def __init__(self) -> None:
        self.specs: dict[ProcessId, ProcessSpec] = {}
        self.terms: dict[ProcessId, int] = {}
        self.adopted: dict[ProcessId, tuple[int, int]] = {}
        self.calls: list[tuple[ProcessId, str, tuple[object, ...]]] = []
        self.killed: list[ProcessId] = []
        self.nodes: dict[ProcessId, str] = {}  # of the processes that were taken over
        self.mute: set[tuple[ProcessId, str]] = set()
        self.answers: dict[str, Callable[[ProcessId], object]] = {
            "open": lambda p: Opened(pid=1000 + p.rank, node="node", store=f"h:{p.rank}"),
            "start": lambda p: Opened(pid=1000 + p.rank, node="node", endpoint=f"{p}:1"),
            "pulse": lambda p: Pulse(ready=True, order=self.adopted.get(p, (0, 0))),
        }
        self._events: list[RuntimeEvent] = []

    def spawn(self, spec: ProcessSpec) -> None:
        self.specs[spec.id] = spec

    def adopt(self, process: ProcessId, node: str) -> None:
        self.nodes[process] = node
        if process not in self.specs:
            self._events.append(Died(process, "not there"))

    def call(self, process: ProcessId, term: int, method: str, *arguments: object) -> None:
        if process not in self.specs:
            return
        if term < self.terms.get(process, 0):
            self._events.append(Raised(process, method, f"term {term} is superseded"))
            return
        self.terms[process] = term
        if method == "adopt" and (process, method) not in self.mute:
            (view,) = arguments
            assert isinstance(view, View)
            self.adopted[process] = max(self.adopted.get(process, (0, 0)), view.order)
        self.calls.append((process, method, arguments))
        if (process, method) in self.mute:
            return
        try:
            value = self.answers.get(method, lambda _: None)(process)
        except ValueError as error:
            self._events.append(Raised(process, method, str(error)))
        else:
            self._events.append(Returned(process, method, value))

    def poll(self) -> list[RuntimeEvent]:
        events, self._events = self._events, []
        return events

    def kill(self, process: ProcessId) -> None:
        if self.specs.pop(process, None) is not None:
            self.killed.append(process)
            self._events.append(Died(process, "killed"))

    def die(self, process: ProcessId) -> None:
        """End a process as if it had crashed."""
        self.specs.pop(process)
        self._events.append(Died(process, "crashed"))

    def say(self, process: ProcessId, method: str, value: object = None) -> None:
        """Answer a call that was muted."""
        self._events.append(Returned(process, method, value))

    def leave(self, process: ProcessId) -> None:
        """Say that the node of a process is about to go."""
        self._events.append(Leaving(process, "its node drains"))

    def named(self, name: str) -> list[ProcessId]:
        """Return the living processes of a member, by its name."""
        return sorted(p for p in self.specs if p.member.name == name)


class FakeClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def advance_s(self, seconds: float) -> None:
        self._now_s += seconds


class MemoryJournal:
    """What durable storage holds; further controllers get one that shares it."""

    def __init__(self, shared: "MemoryJournal | None" = None) -> None:
        self._shared = shared._shared if shared else self
        self.term = self.highest = 0
        self.records: list[Record] = []
        self.trouble: OSError | None = None  # what any use of it raises

    @property
    def views(self) -> list[View]:
        return [record.view for record in self._shared.records]

    def claim_term(self, above: int = 0) -> int:
        self.term = self._shared.highest = max(self._shared.highest, above) + 1
        return self.term

    def is_leading(self) -> bool:
        if self.trouble is not None:
            raise self.trouble
        return self._shared.highest <= self.term

    def append(self, record: Record) -> None:
        if not self.is_leading():
            raise RefusedError(f"term {self.term} is superseded by term {self._shared.highest}")
        self._shared.records.append(record)

    def latest(self) -> Record | None:
        return self._shared.records[-1] if self._shared.records else None
