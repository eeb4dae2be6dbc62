"""The requests that a gateway owns: each runs or is kept, and a session hears of it or none does.

All of it belongs to one event loop; the engine's thread only hands events over.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from cluster.ownership.directory import HARMLESS_TOKENS, MAX_DEATHS, is_suspect
from cluster.ownership.kept import KeptRequest
from workers.clock import Clock
from workers.errors import IsolatedError, StaleAssignmentError
from workers.gateway.snapshot import Snapshot
from workers.types import FinishReason, GatewayStats, Request, SnapshotPlace, TokenEvent

Sink = Callable[[Sequence[TokenEvent]], None]

NO_SNAPSHOTS: Mapping[int, Snapshot] = MappingProxyType({})
_NOT_KEPT = (FinishReason.ERROR, FinishReason.MOVED)
_ON_THE_WAY = 4  # tokens that a front door has not counted yet


class ServingGateway(Protocol):
    """What the endpoint needs of rank 0 of a gateway. No call may block."""

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped for good; None while it runs."""
        ...

    def submit(self, request: Request, sink: Sink, snapshots: Mapping[int, Snapshot] = ...) -> None:
        """Take a request; its events go to the sink, from any thread. Raises at once."""
        ...

    def abort(self, request_id: str) -> None:
        """Free a request's sequences; one that is not there is no error."""
        ...

    def stats(self) -> GatewayStats:
        """Return load and counters."""
        ...

    def prefixes(self) -> Mapping[int, int]:
        """Return the digests of prefixes whose states are kept, with their numbers of tokens."""
        ...


class Listener(Protocol):
    """A session with a front door."""

    @property
    def front_door(self) -> str:
        """The front door's name."""
        ...

    def push(self, events: Iterable[TokenEvent]) -> None:
        """Take events of a request."""
        ...

    def held(self, request_id: str, assignment: int, place: SnapshotPlace) -> None:
        """Hear where a snapshot of a request is whole now."""
        ...

    def superseded(self, request_id: str, assignment: int) -> None:
        """Hear that another call has taken a request over."""
        ...


@dataclass(slots=True)
class _Holding:
    running: Request  # as the engine knows it; its assignment may be older than the owner's
    assignment: int
    kept: KeptRequest
    listener: Listener | None
    window_s: float
    until_s: float | None = None  # set while nobody listens, or all has ended

    @property
    def fence(self) -> tuple[int, str]:
        return (self.assignment, self.listener.front_door if self.listener else "")


class Holdings:
    """Submits, attaches, keeps and frees requests.

    Args:
        worker: Rank 0 of the gateway.
        sink: Takes the engine's events and brings them to `take` on this loop.
        clock: Measures windows.
        max_window_s: The longest window, whatever a request asks for.
        max_kept_tokens: Tokens of ended requests and their prompts; beyond that the oldest are
            forgotten.
        max_deaths: Of gateways, with the same request, before it is failed.
    """

    def __init__(
        self,
        worker: ServingGateway,
        sink: Sink,
        clock: Clock,
        *,
        max_window_s: float,
        max_kept_tokens: int,
        max_deaths: int = MAX_DEATHS,
    ) -> None:
        self._worker = worker
        self._sink = sink
        self._clock = clock
        self._max_window_s = max_window_s
        self._max_kept_tokens = max_kept_tokens
        self._max_deaths = max_deaths
        self._holdings: dict[str, _Holding] = {}

    def __len__(self) -> int:
        return len(self._holdings)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._holdings

    def submit(
        self,
        request: Request,
        listener: Listener,
        snapshots: Mapping[int, Snapshot] = NO_SNAPSHOTS,
    ) -> None:
        """Take a request over from whoever has it here, or run it, from its snapshots if any.

        Raises:
            StaleAssignmentError: A newer assignment is here.
            IsolatedError: Another suspect request runs.
            ExpertmeshError: The gateway does not take it.
        """
        request_id = request.request_id
        held = self._holdings.get(request_id)
        if held is not None and held.fence >= (request.assignment, listener.front_door):
            raise StaleAssignmentError(
                f"assignment {held.assignment} of request {request_id} is here", held.assignment
            )
        if held is not None and held.listener is not None:
            held.listener.superseded(request_id, held.assignment)
        if held is not None and held.kept.continues(request):
            self._attach(held, request, listener)
            return
        if held is not None:
            self._free(request_id)
        self.check_isolation(request)
        self._worker.submit(request, self._sink, snapshots)
        self._holdings[request_id] = _Holding(
            running=request,
            assignment=request.assignment,
            kept=KeptRequest(request),
            listener=listener,
            window_s=min(request.resume_window_s, self._max_window_s),
        )

    def check_isolation(self, request: Request) -> None:
        """Have a suspect wait while another one may still turn out to be harmful.

        Raises:
            IsolatedError: Another suspect request runs, and has not come far since its last loss.
        """
        if not is_suspect(request.deaths, self._max_deaths):
            return
        for held in self._holdings.values():
            is_other = is_suspect(held.running.deaths, self._max_deaths) and not held.kept.has_ended
            if is_other and held.kept.num_new < HARMLESS_TOKENS + _ON_THE_WAY:
                raise IsolatedError(
                    f"request {held.running.request_id} runs here, and gateways died with it too"
                )

    def snapshot(self, request_id: str, assignment: int, place: SnapshotPlace) -> None:
        """Tell whoever listens that a snapshot is whole, if it is of what runs here."""
        held = self._holdings.get(request_id)
        if held is not None and held.running.assignment == assignment and held.listener is not None:
            held.listener.held(request_id, held.assignment, place)

    def abort(self, request_id: str, assignment: int) -> None:
        """Free a request, unless a newer assignment of it is here."""
        held = self._holdings.get(request_id)
        if held is not None and held.assignment <= assignment:
            self._free(request_id)

    def detach(self, request_id: str, assignment: int) -> None:
        """Keep a request without a client for its window."""
        held = self._holdings.get(request_id)
        if held is not None and held.assignment == assignment:
            self._keep(held)

    def listener_gone(self, listener: Listener) -> None:
        """Keep what a session listened to, each for its window."""
        for held in list(self._holdings.values()):
            if held.listener is listener:
                self._keep(held)

    def take(self, events: Iterable[TokenEvent]) -> None:
        """Keep what the engine has emitted, and pass it on."""
        for event in events:
            held = self._holdings.get(event.request_id)
            if held is None or held.running.assignment != event.assignment:
                continue  # freed, and perhaps replaced, since the step
            held.kept.take(event)
            if held.listener is not None:
                held.listener.push([replace(event, assignment=held.assignment)])
            if event.finish in _NOT_KEPT or held.kept.has_ended:
                self._ended(held, failed=event.finish in _NOT_KEPT)

    def tick(self) -> None:
        """Free what was kept for its window."""
        now_s = self._clock.now_s()
        for request_id, held in list(self._holdings.items()):
            if held.until_s is not None and held.until_s <= now_s:
                self._free(request_id)

    def clear(self) -> None:
        """Free all."""
        for request_id in list(self._holdings):
            self._free(request_id)

    def _attach(self, held: _Holding, request: Request, listener: Listener) -> None:
        held.assignment = request.assignment
        held.listener = listener
        held.window_s = min(request.resume_window_s, self._max_window_s)
        listener.push(held.kept.since(request))
        if held.kept.has_ended:
            self._ended(held, failed=False)
        else:
            held.until_s = None

    def _keep(self, held: _Holding) -> None:
        held.listener = None
        if held.window_s <= 0:
            self._free(held.running.request_id)
        elif held.until_s is None:
            held.until_s = self._clock.now_s() + held.window_s

    def _ended(self, held: _Holding, *, failed: bool) -> None:
        """Keep an ended request for its window; one that failed is not worth it."""
        if failed or held.window_s <= 0:
            self._free(held.running.request_id)
            return
        if held.listener is not None or held.until_s is None:
            held.until_s = self._clock.now_s() + held.window_s
        self._forget_oldest()

    def _free(self, request_id: str) -> None:
        held = self._holdings.pop(request_id)
        if not held.kept.has_ended:
            self._worker.abort(request_id)

    def _forget_oldest(self) -> None:
        ended = [held for held in self._holdings.values() if held.kept.has_ended]
        surplus = sum(held.kept.num_tokens for held in ended) - self._max_kept_tokens
        for held in sorted(ended, key=lambda held: held.until_s or 0.0):
            if surplus <= 0:
                return
            surplus -= held.kept.num_tokens
            self._free(held.running.request_id)
