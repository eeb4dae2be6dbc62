"""Where the events of running requests go."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from workers.errors import DuplicateRequestError
from workers.types import Request, TokenEvent

Sink = Callable[[Sequence[TokenEvent]], None]


@dataclass(slots=True)
class _Client:
    request: Request
    sink: Sink
    num_unfinished: int


class Clients:
    """The sinks of running requests, by request id. May be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def add(self, request: Request, sink: Sink) -> None:
        """Register a request; raises DuplicateRequestError while its id is taken."""
        with self._lock:
            if request.request_id in self._clients:
                raise DuplicateRequestError(f"request {request.request_id} is running here already")
            self._clients[request.request_id] = _Client(request, sink, request.num_sequences)

    def drop(self, request_id: str) -> None:
        """Forget a request, if it is there: its sink gets nothing from now on."""
        with self._lock:
            self._clients.pop(request_id, None)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._clients.clear()

    def deliver(self, events: Iterable[TokenEvent]) -> list[str]:
        """Hand the events of a step to their sinks, one call each.

        Returns the ids of requests whose sink raised, which are forgotten; a broken sink is no
        other request's affair.
        """
        by_request: dict[str, list[TokenEvent]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        broken = []
        for request_id, news in by_request.items():
            sink = self._note(request_id, news)
            try:
                if sink is not None:
                    sink(news)
            except Exception:  # noqa: BLE001 - whatever it raises, its client is gone
                self.drop(request_id)
                broken.append(request_id)
        return broken

    def _note(self, request_id: str, news: list[TokenEvent]) -> Sink | None:
        """Return the sink, and forget the request when it ends with these events."""
        with self._lock:
            client = self._clients.get(request_id)
            if client is None or client.request.assignment != news[0].assignment:
                return None  # aborted, and perhaps replaced, since the step
            client.num_unfinished -= sum(event.finish is not None for event in news)
            if client.num_unfinished == 0:
                del self._clients[request_id]
            return client.sink
