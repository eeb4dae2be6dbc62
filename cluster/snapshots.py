"""Snapshots between gateways over gRPC: the service of the one that keeps them, and its client."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import grpc
import structlog

from cluster import wire
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from workers.errors import SnapshotError
from workers.gateway.snapshot import Ended, Holder, Shard, Snapshot, Stamp, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.types import Request

_PIECE_BYTES = 2**20
_PUSH_S = 20.0
_FETCH_S = 10.0
_RELEASE_S = 5.0
_WHOLE_S = 5.0  # how long rank 0's push waits for the parts of the other ranks
_OPTIONS = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.use_local_subchannel_pool", 1),
)

_log = structlog.get_logger()
_Result = TypeVar("_Result")


class SnapshotServicer(gateway_pb2_grpc.SnapshotServiceServicer):
    """Keeps what other gateways push. All methods run on the endpoint's loop."""

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self._whole = asyncio.Condition()

    async def Push(
        self,
        request_iterator: AsyncIterator[gateway_pb2.PushRequest],
        context: grpc.aio.ServicerContext[gateway_pb2.PushRequest, gateway_pb2.PushResponse],
    ) -> gateway_pb2.PushResponse:
        """Take one rank's part."""
        head, wait_s, data = gateway_pb2.ShardHead(), 0.0, bytearray()
        async for message in request_iterator:
            if message.HasField("head"):
                head, wait_s = message.head, message.wait_s
            data += message.data
            if len(data) > head.kv_bytes + head.state_bytes:
                return wire.verdict_message(Verdict.REFUSED)
        verdict = await _aside(len(data), self._take, head, bytes(data))
        if verdict is Verdict.COMPLETE:
            async with self._whole:
                self._whole.notify_all()
        elif verdict is Verdict.STORED and wait_s:
            verdict = await self._wait(wire.stamp_of(head), wait_s)
        return wire.verdict_message(verdict)

    async def Fetch(
        self,
        request: gateway_pb2.FetchRequest,
        context: grpc.aio.ServicerContext[gateway_pb2.FetchRequest, gateway_pb2.FetchResponse],
    ) -> AsyncIterator[gateway_pb2.FetchResponse]:
        """Send the newest snapshot that is whole and not too long."""
        snapshot = self._store.newest(
            request.request_id, request.sequence_index, request.num_tokens
        )
        if snapshot is None:
            return
        for data in snapshot.shards:
            shard = Shard(stamp=snapshot.stamp, owner="", data=data)
            head = await _aside(data.num_bytes, wire.shard_head, shard)
            yield gateway_pb2.FetchResponse(head=head)
            for piece in _pieces(shard):
                yield gateway_pb2.FetchResponse(data=piece)

    async def Release(
        self,
        request: gateway_pb2.ReleaseRequest,
        context: grpc.aio.ServicerContext[gateway_pb2.ReleaseRequest, gateway_pb2.ReleaseResponse],
    ) -> gateway_pb2.ReleaseResponse:
        """Drop what is kept of a sequence, or keep it for a while."""
        key = (request.request_id, request.sequence_index)
        self._store.release(key, request.assignment, has_ended=request.has_ended)
        return gateway_pb2.ReleaseResponse()

    def _take(self, head: gateway_pb2.ShardHead, data: bytes) -> Verdict:
        try:
            return self._store.put(wire.shard_of(head, data))
        except SnapshotError as error:
            _log.warning("a snapshot is refused", owner=head.owner, reason=str(error))
            return Verdict.REFUSED

    async def _wait(self, stamp: Stamp, wait_s: float) -> Verdict:
        """Wait until all parts of a snapshot are there, or its time is over."""
        try:
            async with asyncio.timeout(min(wait_s, _WHOLE_S)), self._whole:
                await self._whole.wait_for(lambda: self._store.is_whole(stamp))
        except TimeoutError:
            return Verdict.STORED
        return Verdict.COMPLETE


class SnapshotClient:
    """Reaches the gateways that keep snapshots. All methods run on one loop.

    Args:
        rank: Rank 0 waits until its snapshots are whole.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def push(self, shard: Shard, holder: Holder) -> Verdict:
        """Send one rank's part of a snapshot; REFUSED also when the holder is out of reach."""
        head = await _aside(shard.data.num_bytes, wire.shard_head, shard)
        wait_s = _WHOLE_S if self._rank == 0 and shard.data.size > 1 else 0.0

        async def messages() -> AsyncIterator[gateway_pb2.PushRequest]:
            first = gateway_pb2.PushRequest(head=head, wait_s=wait_s)
            for piece in _pieces(shard):
                first.data = piece
                yield first
                first = gateway_pb2.PushRequest()

        try:
            answer = await self._stub(holder.endpoint).Push(messages(), timeout=_PUSH_S)
        except grpc.aio.AioRpcError as error:
            _log.debug("a snapshot was not pushed", holder=holder.member, why=error.details())
            return Verdict.REFUSED
        return wire.verdict_of(answer)

    async def fetch(
        self, holder: Holder, request_id: str, sequence_index: int, num_tokens: int
    ) -> Snapshot | None:
        """Return the newest snapshot that holds fewer tokens; None when there is none in reach."""
        request = gateway_pb2.FetchRequest(
            request_id=request_id, sequence_index=sequence_index, num_tokens=num_tokens
        )
        parts: list[tuple[gateway_pb2.ShardHead, bytearray]] = []
        try:
            async for message in self._stub(holder.endpoint).Fetch(request, timeout=_FETCH_S):
                if message.HasField("head"):
                    parts.append((message.head, bytearray()))
                else:
                    parts[-1][1].extend(message.data)
            size = sum(len(data) for _, data in parts)
            return await _aside(size, _snapshot_of, parts)
        except (grpc.aio.AioRpcError, SnapshotError) as error:
            _log.warning(
                "a snapshot is out of reach",
                holder=holder.member,
                request_id=request_id,
                why=str(error),
            )
            return None

    async def release(self, ended: Ended, holder: Holder) -> None:
        """Say that a sequence has left; a holder that is out of reach hears of it otherwise."""
        try:
            await self._stub(holder.endpoint).Release(wire.ended_message(ended), timeout=_RELEASE_S)
        except grpc.aio.AioRpcError as error:
            _log.debug("a snapshot was not released", holder=holder.member, why=error.details())

    async def let_go(self, endpoints: set[str]) -> None:
        """Close the channels to all but these."""
        for endpoint in self._channels.keys() - endpoints:
            await self._channels.pop(endpoint).close(grace=None)

    def _stub(self, endpoint: str) -> "gateway_pb2_grpc.SnapshotServiceAsyncStub":
        if endpoint not in self._channels:
            self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        return gateway_pb2_grpc.SnapshotServiceStub(self._channels[endpoint])


class SnapshotSource:
    """Finds the snapshots that a request names: in this gateway's store, or at their holder."""

    def __init__(self, me: str, store: SnapshotStore, client: SnapshotClient) -> None:
        self._me = me
        self._store = store
        self._client = client
        self.endpoints: Mapping[str, str] = {}  # of the gateways of the adopted View

    async def find(self, request: Request) -> dict[int, Snapshot]:
        """Return what can be had for a request, by sequence; nothing is waited for long."""
        places = {place.sequence_index: place for place in request.snapshots}
        found = await asyncio.gather(
            *(self._find(request, index, place.holder) for index, place in places.items())
        )
        return {i: s for i, s in zip(places, found, strict=True) if s is not None}

    async def _find(self, request: Request, index: int, holder: str) -> Snapshot | None:
        emitted = request.emitted[index] if index < len(request.emitted) else ()
        num_tokens = len(request.prompt_token_ids) + len(emitted)
        if holder == self._me:
            return self._store.newest(request.request_id, index, num_tokens)
        endpoint = self.endpoints.get(holder)
        if endpoint is None:
            return None
        return await self._client.fetch(
            Holder(holder, endpoint), request.request_id, index, num_tokens
        )


def _snapshot_of(parts: Sequence[tuple[gateway_pb2.ShardHead, bytearray]]) -> Snapshot | None:
    shards = [wire.shard_of(head, bytes(data)) for head, data in parts]
    if not shards:
        return None
    return Snapshot(stamp=shards[0].stamp, shards=tuple(shard.data for shard in shards))


def _pieces(shard: Shard) -> Iterator[bytes]:
    """Cut keys and values, then states, into pieces far below a message's limit; at least one."""
    data = shard.data
    if data.num_bytes <= _PIECE_BYTES:
        yield data.kv + data.states
        return
    for whole in (data.kv, data.states):
        for start in range(0, len(whole), _PIECE_BYTES):
            yield whole[start : start + _PIECE_BYTES]


async def _aside(num_bytes: int, function: Callable[..., _Result], *arguments: object) -> _Result:
    """Run what hashes so many bytes: in a thread where it would hold up the loop."""
    if num_bytes <= _PIECE_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
