"""Snapshots between gateways over gRPC: the service of the one that keeps them, and its client."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping

import grpc
import structlog

from cluster import wire
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from cluster.snapshot_stream import KeepStream, Part, head_of, pieces_of
from workers.errors import SnapshotError
from workers.gateway.snapshot import Ended, Holder, Shard, Snapshot, Stamp, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.types import Request

_FETCH_S = 10.0
_WHOLE_S = 5.0  # how long rank 0's push waits for the parts of the other ranks
_OPTIONS = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

_log = structlog.get_logger()


class SnapshotServicer(gateway_pb2_grpc.SnapshotServiceServicer):
    """Keeps what other gateways push. All methods run on the endpoint's loop."""

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self._whole = asyncio.Condition()

    async def Keep(  # type: ignore[override]  # writes: answers come in any order
        self,
        request_iterator: AsyncIterator[gateway_pb2.KeepRequest],
        context: grpc.aio.ServicerContext[gateway_pb2.KeepRequest, gateway_pb2.KeepResponse],
    ) -> None:
        """Take one rank's parts, for as long as it sends any, and hear what has left it."""
        answering = asyncio.Lock()
        part: Part | None = None

        async def keep(part: Part, number: int, wait_s: float) -> None:
            verdict = await self._keep(part, wait_s)
            async with answering:
                await context.write(wire.verdict_message(number, verdict))

        async with asyncio.TaskGroup() as tasks:
            async for request in request_iterator:
                if request.HasField("end"):
                    self._release(request.end)
                    continue
                if request.HasField("head"):
                    part = Part(request.head)
                    number, wait_s = request.number, request.wait_s
                if part is None:
                    break
                part.add(request.kv, request.states)
                if part.is_there:
                    tasks.create_task(keep(part, number, wait_s))
                    part = None
            else:
                return
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a part of a snapshot needs a head")

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
            head = await head_of(shard)
            for kv, states in pieces_of(shard):
                yield gateway_pb2.FetchResponse(head=head, kv=kv, states=states)
                head = None

    async def _keep(self, part: Part, wait_s: float) -> Verdict:
        """Store a part that has come; say COMPLETE when others' parts come within `wait_s`."""
        try:
            shard = await part.shard()
            verdict = self._store.put(shard)
        except SnapshotError as error:
            _log.warning("a snapshot is refused", owner=part.head.owner, reason=str(error))
            return Verdict.REFUSED
        if verdict is Verdict.COMPLETE:
            async with self._whole:
                self._whole.notify_all()
        elif verdict is Verdict.STORED and wait_s:
            return await self._wait(shard.stamp, wait_s)
        return verdict

    async def _wait(self, stamp: Stamp, wait_s: float) -> Verdict:
        """Wait until all parts of a snapshot are there, or its time is over."""
        try:
            async with asyncio.timeout(min(wait_s, _WHOLE_S)), self._whole:
                await self._whole.wait_for(lambda: self._store.is_whole(stamp))
        except TimeoutError:
            return Verdict.STORED
        return Verdict.COMPLETE

    def _release(self, end: gateway_pb2.SequenceEnd) -> None:
        """Drop what is kept of a sequence, or keep it for a while."""
        key = (end.request_id, end.sequence_index)
        self._store.release(key, end.assignment, has_ended=end.has_ended)


class SnapshotClient:
    """Reaches the gateways that keep snapshots. All methods run on one loop.

    Args:
        rank: Rank 0 waits until its snapshots are whole.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._streams: dict[str, KeepStream] = {}

    async def push(self, shard: Shard, holder: Holder) -> Verdict:
        """Send one rank's part of a snapshot; REFUSED also when the holder is out of reach."""
        wait_s = _WHOLE_S if self._rank == 0 and shard.data.size > 1 else 0.0
        return await self._stream(holder).push(shard, wait_s)

    async def release(self, ended: Ended, holder: Holder) -> None:
        """Say that a sequence has left; a holder that is out of reach hears of it otherwise."""
        await self._stream(holder).release(ended)

    async def fetch(
        self, holder: Holder, request_id: str, sequence_index: int, num_tokens: int
    ) -> Snapshot | None:
        """Return the newest snapshot that holds fewer tokens; None when there is none in reach."""
        request = gateway_pb2.FetchRequest(
            request_id=request_id, sequence_index=sequence_index, num_tokens=num_tokens
        )
        parts: list[Part] = []
        try:
            async for message in self._stub(holder.endpoint).Fetch(request, timeout=_FETCH_S):
                if message.HasField("head"):
                    parts.append(Part(message.head))
                parts[-1].add(message.kv, message.states)
            shards = [await part.shard() for part in parts]
        except (grpc.aio.AioRpcError, SnapshotError) as error:
            _log.warning(
                "a snapshot is out of reach",
                holder=holder.member,
                request_id=request_id,
                why=str(error),
            )
            return None
        if not shards:
            return None
        return Snapshot(stamp=shards[0].stamp, shards=tuple(shard.data for shard in shards))

    async def let_go(self, endpoints: Collection[str]) -> None:
        """Close the channels to all but these."""
        for endpoint in self._channels.keys() - set(endpoints):
            self._streams.pop(endpoint, None)
            await self._channels.pop(endpoint).close(grace=None)

    def _stream(self, holder: Holder) -> KeepStream:
        stream = self._streams.get(holder.endpoint)
        if stream is None or stream.is_lost:
            call = self._stub(holder.endpoint).Keep()  # type: ignore[call-arg]  # parts are written
            stream = KeepStream(call, holder.member)
            self._streams[holder.endpoint] = stream
        return stream

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
