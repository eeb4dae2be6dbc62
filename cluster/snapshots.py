"""What gateways ask each other about snapshots, over gRPC; `snapshot_lines` sends them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import grpc
import structlog

from cluster import wire
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from cluster.snapshot_lines import SnapshotKeeper
from workers.errors import SnapshotError
from workers.gateway.snapshot import Holder, Shard, Snapshot
from workers.gateway.snapshot_store import SnapshotStore
from workers.model.packed import PackedShard
from workers.types import Request

_PIECE_BYTES = 2**20  # of keys and values, and of states: together below a message's limit
_KEEP_S = 5.0
_FETCH_S = 10.0
_PREFIX_S = 5.0  # for a prefix; the request that wants it can be computed without
_OPTIONS = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),  # else 60 s, whatever the keepalive says
    ("grpc.use_local_subchannel_pool", 1),
)

_log = structlog.get_logger()
_Result = TypeVar("_Result")


class PrefixGiver(Protocol):
    """Sends what the prefix cache keeps; see `PrefixSender`."""

    async def send(self, digest: int, name: str, receiver: Holder, most_bytes: int) -> bool:
        """Return whether a prefix is whole at its receiver."""
        ...


class SnapshotServicer(gateway_pb2_grpc.SnapshotServiceServicer):
    """Says where other gateways' snapshots are taken, and gives them and prefixes back."""

    def __init__(
        self,
        store: SnapshotStore,
        keeper: SnapshotKeeper,
        prefixes: PrefixGiver,
        find: Callable[[str], Holder | None],
    ) -> None:
        self._store = store
        self._keeper = keeper
        self._prefixes = prefixes
        self._find = find

    async def Keep(
        self,
        request: gateway_pb2.KeepRequest,
        context: grpc.aio.ServicerContext[gateway_pb2.KeepRequest, gateway_pb2.KeepResponse],
    ) -> gateway_pb2.KeepResponse:
        """Say where snapshots are taken."""
        return gateway_pb2.KeepResponse(port=self._keeper.port, key=self._keeper.key)

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
            head = await _aside(data.num_bytes, partial(wire.shard_head, shard))
            for number, (kv, states) in enumerate(_pieces(data)):
                beside = None if number else head
                yield gateway_pb2.FetchResponse(head=beside, kv=kv, states=states)

    async def SendPrefix(
        self,
        request: gateway_pb2.SendPrefixRequest,
        context: grpc.aio.ServicerContext[
            gateway_pb2.SendPrefixRequest, gateway_pb2.SendPrefixResponse
        ],
    ) -> gateway_pb2.SendPrefixResponse:
        """Send a prefix to a gateway of the View, wherever that one listens."""
        receiver = self._find(request.receiver)
        is_whole = receiver is not None and await self._prefixes.send(
            request.digest, request.name, receiver, request.most_bytes
        )
        return gateway_pb2.SendPrefixResponse(is_whole=is_whole)


class SnapshotClient:
    """Asks the gateways that keep snapshots. All methods run on one loop."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def place(self, holder: Holder) -> tuple[str, int, bytes]:
        """Return host, port and key where a gateway takes snapshots; raises OSError."""
        try:
            with _let_go(holder):
                answer = await self._stub(holder.endpoint).Keep(
                    gateway_pb2.KeepRequest(), timeout=_KEEP_S
                )
        except grpc.aio.AioRpcError as error:
            raise OSError(f"{holder.member} is out of reach: {error.details()}") from error
        host = holder.endpoint.rpartition(":")[0].strip("[]")
        return host, answer.port, answer.key

    async def fetch(
        self, holder: Holder, request_id: str, sequence_index: int, num_tokens: int
    ) -> Snapshot | None:
        """Return the newest snapshot that holds fewer tokens; None when there is none in reach."""
        request = gateway_pb2.FetchRequest(
            request_id=request_id, sequence_index=sequence_index, num_tokens=num_tokens
        )
        parts: list[list[gateway_pb2.FetchResponse]] = []
        try:
            with _let_go(holder):
                async for message in self._stub(holder.endpoint).Fetch(request, timeout=_FETCH_S):
                    if message.HasField("head"):
                        parts.append([])
                    parts[-1].append(message)
            size = sum(len(piece.kv) + len(piece.states) for part in parts for piece in part)
            shards = await _aside(size, lambda: [_shard_of(part) for part in parts])
        except (grpc.aio.AioRpcError, OSError, SnapshotError) as error:
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

    async def send_prefix(
        self, holder: Holder, digest: int, name: str, receiver: str, most_bytes: int
    ) -> bool:
        """Have a gateway send a prefix that it keeps; return whether the receiver has it.

        Raises OSError when it is out of reach, or late.
        """
        request = gateway_pb2.SendPrefixRequest(
            digest=digest, name=name, receiver=receiver, most_bytes=most_bytes
        )
        try:
            with _let_go(holder):
                answer = await self._stub(holder.endpoint).SendPrefix(request, timeout=_PREFIX_S)
        except grpc.aio.AioRpcError as error:
            raise OSError(f"{holder.member} is out of reach: {error.details()}") from error
        return answer.is_whole

    async def let_go(self, endpoints: Collection[str]) -> None:
        """Close the channels to all but these."""
        for endpoint in self._channels.keys() - set(endpoints):
            if channel := self._channels.pop(endpoint, None):  # the View before may be at it, too
                await channel.close(grace=None)

    def _stub(self, endpoint: str) -> "gateway_pb2_grpc.SnapshotServiceAsyncStub":
        if endpoint not in self._channels:
            self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        return gateway_pb2_grpc.SnapshotServiceStub(self._channels[endpoint])


class PrefixFinder(Protocol):
    """Finds the prefix that a request names; see `PrefixSource`."""

    async def find(self, request: Request, endpoints: Mapping[str, str]) -> Snapshot | None:
        """Return it as a snapshot; None when it is out of reach."""
        ...


class SnapshotSource:
    """Finds what a request names: in this gateway's store, or at other gateways."""

    def __init__(
        self, me: str, store: SnapshotStore, client: SnapshotClient, prefixes: PrefixFinder
    ) -> None:
        self._me = me
        self._store = store
        self._client = client
        self._prefixes = prefixes
        self.endpoints: Mapping[str, str] = {}  # of the gateways of the adopted View

    def holder(self, member: str) -> Holder | None:
        """Return where a gateway of the View listens."""
        endpoint = self.endpoints.get(member)
        return None if endpoint is None else Holder(member, endpoint)

    async def find(self, request: Request) -> dict[int, Snapshot]:
        """Return what can be had for a request, by sequence; nothing is waited for long."""
        if not request.snapshots:
            prefix = await self._prefixes.find(request, self.endpoints)
            return {} if prefix is None else dict.fromkeys(range(request.num_sequences), prefix)
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
        keeper = self.holder(holder)
        if keeper is None:
            return None
        return await self._client.fetch(keeper, request.request_id, index, num_tokens)


@contextlib.contextmanager
def _let_go(holder: Holder) -> Iterator[None]:
    """Raise OSError where a call was cancelled with its channel, and not its caller."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionError(f"{holder.member} has left") from None


def _pieces(data: PackedShard) -> Iterator[tuple[bytes, bytes]]:
    """Cut keys and values, and states, into pieces; at least one."""
    if data.num_bytes <= _PIECE_BYTES:
        yield data.kv, data.states
        return
    starts = range(0, max(len(data.kv), len(data.states)), _PIECE_BYTES)
    cut = [slice(start, start + _PIECE_BYTES) for start in starts]
    yield from ((data.kv[piece], data.states[piece]) for piece in cut)


def _shard_of(part: Sequence[gateway_pb2.FetchResponse]) -> Shard:
    kv, states = (
        b"".join(pieces) for pieces in zip(*((p.kv, p.states) for p in part), strict=True)
    )
    return wire.shard_of(part[0].head, kv, states)


async def _aside(num_bytes: int, function: Callable[[], _Result]) -> _Result:
    """Run what hashes so many bytes: in a thread where it would hold up the loop."""
    if num_bytes <= _PIECE_BYTES:
        return function()
    return await asyncio.to_thread(function)
