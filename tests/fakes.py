"""Hand-written stand-ins for the parts that a front door talks to."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.ownership.directory import Claim, Grant
from workers.errors import DrainingError, DuplicateRequestError, OverloadedError
from workers.gateway.snapshot import Snapshot
from workers.types import FinishReason, GatewayStats, Request, TokenEvent, TokenLogprob

NO_SNAPSHOTS: Mapping[int, Snapshot] = {}
Sink = Callable[[Sequence[TokenEvent]], None]


@dataclass
class FakeClock:
    """Time that stands still until it is moved."""

    time_s: float = 0.0

    def now_s(self) -> float:
        return self.time_s


@dataclass
class _Running:
    request: Request
    sink: Sink
    positions: list[int]
    ended: set[int] = field(default_factory=set)


class FakeGateway:
    """Rank 0 of a gateway that says what it is told to say, from a thread of its own.

    `reply` gives the completion of a sequence; as with a real gateway it depends on the request
    alone, so that any gateway goes on where another one stopped. One step emits `tokens_per_step`
    of each sequence. It stops at `hold_after` tokens a sequence until `go_on` is called.
    """

    def __init__(
        self,
        reply: Callable[[Request, int], Sequence[int]],
        *,
        tokens_per_step: int = 1,
        hold_after: int | None = None,
        max_requests: int = 1000,
    ) -> None:
        self.submitted: list[Request] = []
        self.snapshots: dict[tuple[str, int], Snapshot] = {}
        self.aborted: list[str] = []
        self.failure: str | None = None
        self.is_draining = False
        self.kept_prefixes: dict[int, int] = {}
        self._reply = reply
        self._tokens_per_step = tokens_per_step
        self._hold_after = hold_after
        self._max_requests = max_requests
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, sink: Sink, snapshots: Mapping[int, Snapshot] = NO_SNAPSHOTS
    ) -> None:
        with self._lock:
            self.snapshots.update({(request.request_id, i): s for i, s in snapshots.items()})
            if self.is_draining:
                raise DrainingError("this gateway is draining")
            if request.request_id in self._running:
                raise DuplicateRequestError(f"request {request.request_id} is in flight")
            if len(self._running) >= self._max_requests:
                raise OverloadedError("the gateway's queue is full", 2.5)
            self.submitted.append(request)
            positions = [len(tokens) for tokens in request.emitted] or [0] * request.num_sequences
            self._running[request.request_id] = _Running(request, sink, positions)

    def abort(self, request_id: str) -> None:
        with self._lock:
            self.aborted.append(request_id)
            self._running.pop(request_id, None)

    def stats(self) -> GatewayStats:
        with self._lock:
            return GatewayStats(
                running=len(self._running),
                kv_blocks_used=len(self._running),
                kv_blocks_total=4 * self._max_requests,
                state_blocks_used=len(self._running),
                state_blocks_total=self._max_requests,
                rows_by_worker={"expert-0.1": 7},
            )

    def prefixes(self) -> dict[int, int]:
        return dict(self.kept_prefixes)

    @property
    def num_running(self) -> int:
        with self._lock:
            return len(self._running)

    @property
    def is_held(self) -> bool:
        """Whether there is work and all of it waits for `go_on`."""
        with self._lock:
            return bool(self._running) and all(
                index in running.ended or position == self._hold_after
                for running in self._running.values()
                for index, position in enumerate(running.positions)
            )

    def go_on(self) -> None:
        self._hold_after = None

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._ended.wait(0.0005):
            with self._lock:
                for running in list(self._running.values()):
                    events = [
                        e for i in range(len(running.positions)) if (e := self._step(running, i))
                    ]
                    if len(running.ended) == len(running.positions):
                        del self._running[running.request.request_id]
                    if events:
                        running.sink(events)

    def _step(self, running: _Running, index: int) -> TokenEvent | None:
        if index in running.ended:
            return None
        request, start = running.request, running.positions[index]
        stopping = request.stopping
        reply = list(self._reply(request, index))[: stopping.max_tokens]
        end = min(start + self._tokens_per_step, len(reply))
        if self._hold_after is not None:
            end = min(end, self._hold_after)
        if end <= start and start < len(reply):
            return None
        running.positions[index] = end
        finish, stop_token_id = None, None
        if end == len(reply):
            running.ended.add(index)
            is_stop = bool(reply) and reply[-1] in stopping.ending_ids
            finish = FinishReason.STOP if is_stop else FinishReason.LENGTH
            stop_token_id = reply[-1] if is_stop else None
        tokens = tuple(reply[start:end])
        wanted = request.output
        return TokenEvent(
            request_id=request.request_id,
            sequence_index=index,
            assignment=request.assignment,
            first_token_index=start,
            token_ids=tokens,
            logprobs=()
            if wanted.logprobs is None
            else tuple(TokenLogprob(t, -0.5, ((t, -0.5),) * wanted.logprobs) for t in tokens),
            prompt_logprobs=(None, *(TokenLogprob(t, -1.0) for t in request.prompt_token_ids[1:]))
            if wanted.prompt_logprobs is not None and index == 0 and start == 0
            else (),
            finish=finish,
            stop_token_id=stop_token_id,
            cached_tokens=1,
        )


class LoneOwnership:
    """Claims of the only front door there is: granted, and nobody else's."""

    async def take(self, holder: object, *, above: int, held: int, takes_over: bool) -> Grant:
        return Grant(above + 1)

    def hold(self, holder: object) -> None:
        return None

    def release(self, claim: Claim) -> None:
        return None
