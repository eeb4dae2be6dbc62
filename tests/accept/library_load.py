"""A load of which every request goes through the client library, as a program's would.

Some clients name one address, behind which any front door answers, as behind a Kubernetes Service;
the others name as many as there are front doors. Behind each address is a cable of its own, so that
a client's connections can be cut, and it is known which front door has which call.
"""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.chaos.cable import Cable
from cluster.chaos.doors import Doors
from cluster.chaos.history import Answer, Arrival, Ask
from cluster.chaos.load import draw_ask, legs_of
from expertmesh_client import (
    AsyncClient,
    Client,
    ExpertmeshError,
    Sampling,
    Stopping,
    Update,
)
from workers.clock import Clock

# Kinds of clients: whether it has an event loop, and whether it names every front door.
KINDS = ((True, False), (True, True), (True, False), (False, True))


@dataclass(eq=False)
class Call:
    """One attempt of the library: to which of its addresses, and when it ended if it has."""

    target: int
    begun_s: float
    call: Any
    ended_s: float | None = None


@dataclass(eq=False)
class Asked:
    """A request under way, or one that has ended."""

    answer: Answer
    caller: "Caller"
    request_id: str
    calls: list[Call] = field(default_factory=list)

    @property
    def door(self) -> str:
        """Where the front door listens that has its call; empty where nobody can say so."""
        if not self.calls or self.calls[-1].ended_s is not None:
            return ""
        ways = self.caller.cables[self.calls[-1].target].endpoints
        return ways[0] if len(ways) == 1 else ""

    def note(self, update: Update, at_s: float) -> None:
        """Write down what the library yields, just as it does."""
        index = update.sequence_index
        if update.token_ids:
            arrival = Arrival(at_s, update.first_token_index, update.token_ids)
            self.answer.arrivals.setdefault(index, []).append(arrival)
        if update.finish is not None:
            self.answer.finishes[index] = update.finish.reason.upper()

    def judge_calls(self, ends: Sequence[tuple[grpc.StatusCode, str]], trailing: Any) -> None:
        """Write down which calls broke, and which gateways had the last one."""
        broken = [f"{code.name}: {why}" for code, why in ends if code is not grpc.StatusCode.OK]
        self.answer.breaks += broken
        self.answer.legs = legs_of(trailing)


class Slots:
    """Which front door has which address, as front doors come and go."""

    def __init__(self, doors: Doors, seed: int) -> None:
        self._doors = doors
        self._draw = random.Random(f"{seed}/slots")
        self._taken: dict[int, str] = {}

    def any(self) -> str:
        """Return a front door, as a Service does."""
        return self._draw.choice(self._doors.endpoints)

    def at(self, slot: int) -> str:
        """Return the one at a fixed address; one that is gone until another has its place."""
        free = [e for e in self._doors.endpoints if e not in self._taken.values()]
        if free and self._taken.get(slot) not in self._doors.endpoints:
            self._taken[slot] = free[0]
        return self._taken.get(slot) or self.any()


class Caller:
    """One client of the library, with a cable for each of its addresses; several ask through it."""

    def __init__(
        self, name: str, cables: Sequence[Cable], *, has_loop: bool, seed: int, clock: Clock
    ) -> None:
        self.name = name
        self.cables = cables
        self._has_loop = has_loop
        self._seed = seed
        self._clock = clock
        self._client: Any = None
        self._asked: dict[str, Asked] = {}

    async def open(self, stack: AsyncExitStack) -> None:
        """Lay the cables and make the client; both end with the stack."""
        for cable in self.cables:
            stack.push_async_callback(cable.close)
        targets = [await cable.lay() for cable in self.cables]
        if self._has_loop:
            self._client = await stack.enter_async_context(AsyncClient(targets, seed=self._seed))
        else:
            self._client = stack.enter_context(Client(targets, seed=self._seed))
        send, self._client._send = self._client._send, lambda attempt: self._noted(attempt, send)

    async def follow(self, asked: Asked, threads: Executor) -> None:
        """Send a request, and write down all that comes of it."""
        self._asked[asked.request_id] = asked
        try:
            if self._has_loop:
                await self._follow(asked)
            else:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(threads, self._follow_in_thread, asked)
        except ExpertmeshError as error:
            asked.answer.error = str(error)
        finally:
            del self._asked[asked.request_id]

    async def _follow(self, asked: Asked) -> None:
        try:
            async for update in self._client.generate(**options_of(asked)):
                asked.note(update, self._clock.now_s())
        finally:
            calls = [call.call for call in asked.calls]
            ends = [(await call.code(), await call.details()) for call in calls]
            asked.judge_calls(ends, await calls[-1].trailing_metadata())

    def _follow_in_thread(self, asked: Asked) -> None:
        try:
            for update in self._client.generate(**options_of(asked)):
                asked.note(update, self._clock.now_s())
        finally:
            calls = [call.call for call in asked.calls]
            ends = [(call.code(), call.details()) for call in calls]
            asked.judge_calls(ends, calls[-1].trailing_metadata())

    def _noted(self, attempt: Any, send: Callable[[Any], Any]) -> Any:
        """Send an attempt as the library does, and keep it."""
        call = Call(attempt.target, self._clock.now_s(), send(attempt))

        def ended(*_: object) -> None:
            call.ended_s = self._clock.now_s()

        add = call.call.add_done_callback if self._has_loop else call.call.add_callback
        if add(ended) is False:
            ended()
        self._asked[attempt.request.request_id].calls.append(call)
        return call.call


def options_of(asked: Asked) -> dict[str, Any]:
    """Return how the library is called for a request of the load."""
    ask: Ask = asked.answer.ask
    return {
        "prompt": ask.prompt_token_ids,
        "request_id": asked.request_id,
        "resume_window_s": ask.resume_window_s,
        "sampling": Sampling(
            temperature=ask.temperature,
            top_p=ask.top_p,
            top_k=0,
            min_p=0,
            presence_penalty=0,
            frequency_penalty=0,
            repetition_penalty=1,
            seed=ask.seed,
            num_sequences=ask.num_sequences,
        ),
        "stopping": Stopping(max_tokens=ask.max_tokens, ignore_eos=True),
    }


class LibraryLoad:
    """Keeps `concurrency` requests under way, spread over clients of all `KINDS`.

    Args:
        doors: The front doors, as the View names them.
        vocabulary_size: Prompts are drawn from that many token ids.
        num_doors: How many addresses those clients name that name all.
        concurrency: Requests at once.
        seed: Fixes the requests, and what clients draw.
        clock: That of the faults.
    """

    def __init__(
        self,
        doors: Doors,
        vocabulary_size: int,
        *,
        num_doors: int,
        concurrency: int,
        seed: int,
        clock: Clock,
    ) -> None:
        self.all: list[Asked] = []
        self._vocabulary_size = vocabulary_size
        self._concurrency = concurrency
        self._seed = seed
        self._clock = clock
        self._stopping = False
        slots = Slots(doors, seed)
        self.callers = [
            Caller(
                f"{'async' if has_loop else 'sync'}, {'all' if is_named else 'one'} named",
                [Cable(way) for way in _ways(slots, num_doors if is_named else 0)],
                has_loop=has_loop,
                seed=seed + number,
                clock=clock,
            )
            for number, (has_loop, is_named) in enumerate(KINDS)
        ]

    @property
    def answers(self) -> list[Answer]:
        """What came for each request, also of those under way."""
        return [asked.answer for asked in self.all]

    def running(self) -> list[Asked]:
        """Return the requests that are under way."""
        return [a for a in self.all if not (a.answer.is_complete or a.answer.error)]

    async def run(self) -> None:
        """Send requests until `stop`, and let the last ones finish."""
        async with AsyncExitStack() as stack:
            for caller in self.callers:
                await caller.open(stack)
            threads = stack.enter_context(ThreadPoolExecutor(self._concurrency))
            turns = range(self._concurrency)
            callers = [self.callers[turn % len(self.callers)] for turn in turns]
            await asyncio.gather(*(self._keep_asking(caller, threads) for caller in callers))

    def stop(self) -> None:
        """Send no further requests."""
        self._stopping = True

    async def _keep_asking(self, caller: Caller, threads: Executor) -> None:
        while not self._stopping:
            number = len(self.all)
            answer = Answer(
                draw_ask(self._seed, number, self._vocabulary_size), self._clock.now_s()
            )
            asked = Asked(answer, caller, f"library-{self._seed}-{number}")
            self.all.append(asked)
            await caller.follow(asked, threads)


def _ways(slots: Slots, count: int) -> Iterator[Callable[[], str]]:
    """Yield what chooses the front door of each address: of one for all, or of one for each."""
    if not count:
        yield slots.any
    for slot in range(count):
        yield lambda slot=slot: slots.at(slot)
