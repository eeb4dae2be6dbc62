"""Virtual time: events in order of time, and greenlets that wait for it instead of blocking.

Everything happens in one thread, in an order that the seed decides alone.
"""

import heapq
import random
from collections.abc import Callable

from greenlet import getcurrent, greenlet

MOST_QUESTIONS = 20_000


class SpinError(AssertionError):
    """Something runs in circles: time stands still."""


class Simulator:
    """The clock, the queue of events and the dice of one run."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.trace: list[str] = []
        self._now_s = 0.0
        self._asked = 0
        self._count = 0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._hub = getcurrent()

    def now_s(self) -> float:
        """Return the time; whoever asks again and again while none passes is going in circles."""
        self._asked += 1
        if self._asked > MOST_QUESTIONS:
            raise SpinError(f"asked the time {self._asked} times at {self._now_s:.4f} s")
        return self._now_s

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self._now_s:9.4f} {text}")

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        """Do something later."""
        self._count += 1
        heapq.heappush(self._events, (self._now_s + delay_s, self._count, action))

    def start(self, body: Callable[[], object]) -> None:
        """Run a body that may sleep or wait, from the next event on."""
        self.after(0.0, greenlet(body, self._hub).switch)

    def sleep(self, seconds: float) -> None:
        """Let time pass for the greenlet that calls."""
        self.after(seconds, getcurrent().switch)
        self._hub.switch()

    def park(self) -> None:
        """Leave the greenlet that calls until somebody switches to it."""
        self._hub.switch()

    def run(self, until_s: float, done: Callable[[], bool]) -> bool:
        """Do events until `done`, or time is up; says whether it was done."""
        self._hub = getcurrent()
        while not done():
            if not self._events or self._events[0][0] > until_s:
                return False
            at_s, _, action = heapq.heappop(self._events)
            if at_s > self._now_s:
                self._now_s, self._asked = at_s, 0
            action()
        return True


class Wait:
    """One wait of one greenlet: ends by a call or at a deadline, once."""

    def __init__(self, simulator: Simulator, seconds: float) -> None:
        self._simulator = simulator
        self._greenlet = getcurrent()
        self._ended = False
        self.timed_out = False
        if seconds != float("inf"):
            simulator.after(seconds, self._expire)

    def park(self) -> bool:
        """Wait; says whether it ended before its deadline."""
        self._simulator.park()
        return not self.timed_out

    def end(self) -> None:
        """End it, in an event of its own."""
        if not self._ended:
            self._ended = True
            self._simulator.after(0.0, self._greenlet.switch)

    def _expire(self) -> None:
        if not self._ended:
            self._ended = self.timed_out = True
            self._greenlet.switch()


class SimCondition:
    """Stands in for a `threading.Condition` that guards nothing: there is one thread."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._waits: list[Wait] = []

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        return None

    def wait(self, timeout: float | None = None) -> bool:
        wait = Wait(self._simulator, float("inf") if timeout is None else timeout)
        self._waits.append(wait)
        return wait.park()

    def notify_all(self) -> None:
        waits, self._waits = self._waits, []
        for wait in waits:
            wait.end()
