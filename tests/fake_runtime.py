"""A runtime without processes: calls are answered by a script, deaths come when a test says so."""

from collections.abc import Callable

from cluster.control.ports import Died, Opened, ProcessId, ProcessSpec, Pulse, Raised, Returned


class FakeRuntime:
    """Answers every call at the next poll; `answer` may be replaced per method."""

    def __init__(self) -> None:
        self.specs: dict[ProcessId, ProcessSpec] = {}
        self.calls: list[tuple[ProcessId, str, tuple[object, ...]]] = []
        self.killed: list[ProcessId] = []
        self.mute: set[tuple[ProcessId, str]] = set()
        self.answers: dict[str, Callable[[ProcessId], object]] = {
            "open": lambda p: Opened(pid=1000 + p.rank, node="node", store=f"h:{p.rank}"),
            "start": lambda p: Opened(pid=1000 + p.rank, node="node", endpoint=f"{p}:1"),
            "pulse": lambda _: Pulse(ready=True, order=(2**31, 0)),
        }
        self._events: list[Returned | Raised | Died] = []

    def spawn(self, spec: ProcessSpec) -> None:
        self.specs[spec.id] = spec

    def call(self, process: ProcessId, method: str, *arguments: object) -> None:
        if process not in self.specs:
            return
        self.calls.append((process, method, arguments))
        if (process, method) in self.mute:
            return
        try:
            value = self.answers.get(method, lambda _: None)(process)
        except ValueError as error:
            self._events.append(Raised(process, method, str(error)))
        else:
            self._events.append(Returned(process, method, value))

    def poll(self) -> list[Returned | Raised | Died]:
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
    """A journal that several controllers may share."""

    def __init__(self) -> None:
        self.term = 0
        self.views = []

    def claim_term(self) -> int:
        self.term += 1
        return self.term

    def append(self, view) -> None:
        from workers.errors import RefusedError

        if view.term < self.term:
            raise RefusedError(f"term {view.term} is superseded by term {self.term}")
        self.views.append(view)

    def latest(self):
        return self.views[-1] if self.views else None
