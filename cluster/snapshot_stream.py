"""One rank's snapshots on their way to the gateway that keeps them: one gRPC call for all of them.

A call of its own for each snapshot costs more than the snapshot itself where models are small.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc
import structlog

from cluster import wire
from cluster.pb.expertmesh.v1 import gateway_pb2
from workers.gateway.snapshot import Ended, Shard, Verdict

PIECE_BYTES = 2**20  # far below a message's limit
PUSH_S = 20.0  # for sending a part, and again for its answer

KeepCall = grpc.aio.StreamStreamCall[gateway_pb2.KeepRequest, gateway_pb2.KeepResponse]

_log = structlog.get_logger()
_Result = TypeVar("_Result")


class Part:
    """A shard that comes in pieces."""

    def __init__(self, head: gateway_pb2.ShardHead) -> None:
        self.head = head
        self._num_missing = head.kv_bytes + head.state_bytes
        self._kv: list[bytes] = []
        self._states: list[bytes] = []

    @property
    def is_there(self) -> bool:
        """Whether all of its bytes have come, or more than that."""
        return self._num_missing <= 0

    def add(self, kv: bytes, states: bytes) -> None:
        """Take the next piece."""
        self._num_missing -= len(kv) + len(states)
        self._kv.append(kv)
        self._states.append(states)

    async def shard(self) -> Shard:
        """Return the shard; raises SnapshotError when it is not what was sent."""
        return await _aside(self.head.kv_bytes + self.head.state_bytes, self._joined)

    def _joined(self) -> Shard:
        return wire.shard_of(self.head, b"".join(self._kv), b"".join(self._states))


async def head_of(shard: Shard) -> gateway_pb2.ShardHead | None:
    """Return what goes beside the first piece."""
    return await _aside(shard.data.num_bytes, lambda: wire.shard_head(shard))


def pieces_of(shard: Shard) -> Iterator[tuple[bytes, bytes]]:
    """Cut keys and values, and states, into pieces; at least one."""
    data = shard.data
    if data.num_bytes <= PIECE_BYTES:
        yield data.kv, data.states
        return
    yield from ((kv, b"") for kv in _cut(data.kv))
    yield from ((b"", states) for states in _cut(data.states))


class KeepStream:
    """A `Keep` call to one holder, for as long as both live. All methods run on one loop.

    It is lost at the first error, and when a part takes longer than `push_s`: whatever is pushed
    then is REFUSED.
    """

    def __init__(self, call: KeepCall, holder: str, *, push_s: float = PUSH_S) -> None:
        self._call = call
        self._holder = holder
        self._push_s = push_s
        self._sending = asyncio.Lock()  # the pieces of a part are not mixed with others
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Verdict]] = {}
        self.is_lost = False
        self._listening = asyncio.create_task(self._listen())

    async def push(self, shard: Shard, wait_s: float) -> Verdict:
        """Send a part and return what became of it."""
        if self.is_lost:
            return Verdict.REFUSED
        number = next(self._numbers)
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        head = await head_of(shard)
        try:
            async with self._sending, asyncio.timeout(self._push_s):
                for kv, states in pieces_of(shard):
                    await self._write(
                        gateway_pb2.KeepRequest(
                            head=head, kv=kv, states=states, number=number, wait_s=wait_s
                        )
                    )
                    head = None
            async with asyncio.timeout(self._push_s):
                return await answer
        except TimeoutError:
            self._lose(f"a part of {shard.data.num_bytes} bytes took over {self._push_s:g} s")
            return Verdict.REFUSED
        finally:
            self._answers.pop(number, None)

    async def release(self, ended: Ended) -> None:
        """Say that a sequence has left."""
        async with self._sending:
            await self._write(gateway_pb2.KeepRequest(end=wire.ended_message(ended)))

    async def _write(self, request: gateway_pb2.KeepRequest) -> None:
        if self.is_lost:
            return
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._lose(_reason(error))

    async def _listen(self) -> None:
        reason = "the stream has ended"
        try:
            async for answer in self._call:
                self._answer(answer.number, wire.verdict_of(answer))
        except grpc.aio.AioRpcError as error:
            reason = _reason(error)
        finally:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._call.cancel()
            _log.debug("snapshots cannot be pushed", holder=self._holder, why=reason)
        for number in tuple(self._answers):
            self._answer(number, Verdict.REFUSED)

    def _answer(self, number: int, verdict: Verdict) -> None:
        waiting = self._answers.pop(number, None)
        if waiting is not None and not waiting.done():  # it may have been cancelled
            waiting.set_result(verdict)


def _reason(error: Exception) -> str:
    details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return details or "the stream has ended"


def _cut(data: bytes) -> Iterator[bytes]:
    return (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


async def _aside(num_bytes: int, function: Callable[[], _Result]) -> _Result:
    """Run what hashes so many bytes: in a thread where it would hold up the loop."""
    if num_bytes <= PIECE_BYTES:
        return function()
    return await asyncio.to_thread(function)
