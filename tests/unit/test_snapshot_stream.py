"""Snapshots between two processes' loops, over real gRPC."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from cluster.snapshot_stream import PIECE_BYTES, KeepStream
from cluster.snapshots import SnapshotClient, SnapshotServicer
from workers.clock import SystemClock
from workers.gateway.snapshot import Ended, Holder, Shard, Stamp, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.model.packed import PackedShard

RANDOM = random.Random(3)
SMALL = 1000
LARGE = 2 * PIECE_BYTES + 17


def shard(
    position: int = 64, *, start: int = 0, rank: int = 0, size: int = 1, num_bytes: int = SMALL,
    request_id: str = "r",
) -> Shard:  # fmt: skip
    stamp = Stamp(
        request_id=request_id, sequence_index=0, assignment=1, position=position,
        weights_version="w", tokens=b"t",
    )  # fmt: skip
    data = PackedShard(
        rank=rank, size=size, start=start, position=position, dtype="float32",
        kv=RANDOM.randbytes(8 * (position - start)), states=RANDOM.randbytes(num_bytes),
    )  # fmt: skip
    return Shard(stamp=stamp, owner="gateway-1.1", data=data)


class Keeper:
    """A gateway that keeps snapshots, as others see it."""

    def __init__(self) -> None:
        self.store = SnapshotStore(2**30, SystemClock())
        self.server = grpc.aio.server()
        gateway_pb2_grpc.add_SnapshotServiceServicer_to_server(
            SnapshotServicer(self.store), self.server
        )
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.holder = Holder("gateway-0.1", f"127.0.0.1:{self.port}")


@contextlib.asynccontextmanager
async def keeping() -> AsyncIterator[Keeper]:
    keeper = Keeper()
    await keeper.server.start()
    try:
        yield keeper
    finally:
        await keeper.server.stop(grace=None)


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@pytest.mark.parametrize("num_bytes", [0, SMALL, PIECE_BYTES, LARGE])
def test_what_is_pushed_is_fetched(num_bytes: int) -> None:
    async def work() -> None:
        async with keeping() as keeper:
            client, sent = SnapshotClient(), shard(num_bytes=num_bytes)
            assert await client.push(sent, keeper.holder) is Verdict.COMPLETE
            found = await client.fetch(keeper.holder, "r", 0, 65)
            assert found is not None
            assert (found.stamp, found.shards) == (sent.stamp, (sent.data,))
            assert await client.fetch(keeper.holder, "r", 0, 64) is None
            await client.let_go(())

    run(work())


def test_parts_of_many_sizes_share_a_call_and_each_gets_its_own_verdict() -> None:
    async def work() -> None:
        async with keeping() as keeper:
            client = SnapshotClient()
            sizes = [LARGE if i % 3 == 0 else SMALL for i in range(12)]
            whole = [shard(num_bytes=n, request_id=f"r{i}") for i, n in enumerate(sizes)]
            lost = shard(128, start=64, request_id="no base")
            verdicts = await asyncio.gather(
                *(client.push(s, keeper.holder) for s in (*whole, lost))
            )
            assert verdicts == [Verdict.COMPLETE] * 12 + [Verdict.NO_BASE]
            for i, sent in enumerate(whole):
                found = await client.fetch(keeper.holder, f"r{i}", 0, 65)
                assert found is not None
                assert found.shards == (sent.data,)
            await client.let_go(())

    run(work())


def test_rank_0_hears_that_a_snapshot_is_whole_while_other_parts_pass() -> None:
    async def work() -> None:
        async with keeping() as keeper:
            first, second = SnapshotClient(rank=0), SnapshotClient(rank=1)
            waiting = asyncio.create_task(first.push(shard(size=2), keeper.holder))
            alone = await first.push(shard(request_id="alone"), keeper.holder)
            assert alone is Verdict.COMPLETE
            assert not waiting.done()
            part = shard(rank=1, size=2, num_bytes=SMALL)
            assert await second.push(part, keeper.holder) is Verdict.COMPLETE
            assert await waiting is Verdict.COMPLETE
            for client in (first, second):
                await client.let_go(())

    run(work())


def test_a_sequence_that_has_left_is_dropped_after_its_last_part() -> None:
    async def work() -> None:
        async with keeping() as keeper:
            client = SnapshotClient()
            await client.push(shard(), keeper.holder)
            await client.release(Ended("r", 0, 1, has_ended=True), keeper.holder)
            await client.push(shard(request_id="other"), keeper.holder)  # behind it on the call
            assert await client.fetch(keeper.holder, "r", 0, 65) is None
            assert await client.fetch(keeper.holder, "other", 0, 65) is not None
            await client.let_go(())

    run(work())


def test_damaged_bytes_are_refused_and_the_call_goes_on() -> None:
    async def work() -> None:
        async with (
            keeping() as keeper,
            grpc.aio.insecure_channel(keeper.holder.endpoint) as channel,
        ):
            call: Any = gateway_pb2_grpc.SnapshotServiceStub(channel).Keep()  # type: ignore[call-arg]
            head = gateway_pb2.ShardHead(size=1, position=4, kv_bytes=4, digest=b"x")
            for number, kv in enumerate((b"1234", b"12345", b"1234")):
                await call.write(gateway_pb2.KeepRequest(head=head, kv=kv, number=number))
            for number in range(3):
                answer = await call.read()
                assert answer.number == number
                assert answer.verdict == gateway_pb2.SNAPSHOT_VERDICT_REFUSED
            await call.write(gateway_pb2.KeepRequest(kv=b"1234"))
            with pytest.raises(grpc.aio.AioRpcError):
                await call.read()
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(work())


def test_a_holder_that_is_gone_refuses_and_one_that_is_back_is_found() -> None:
    async def work() -> None:
        client = SnapshotClient()
        async with keeping() as keeper:
            assert await client.push(shard(), keeper.holder) is Verdict.COMPLETE
        assert await client.push(shard(128), keeper.holder) is Verdict.REFUSED
        await client.release(Ended("r", 0, 1, has_ended=True), keeper.holder)
        async with keeping() as keeper:
            assert await client.push(shard(), keeper.holder) is Verdict.COMPLETE
            await client.let_go(())

    run(work())


def test_who_is_let_go_refuses_what_was_under_way() -> None:
    async def work() -> None:
        async with keeping() as keeper:
            client = SnapshotClient()
            waiting = asyncio.create_task(client.push(shard(size=2), keeper.holder))
            await client.push(shard(request_id="other"), keeper.holder)
            await client.let_go((keeper.holder.endpoint,))
            assert not waiting.done()
            await client.let_go(())
            assert await waiting is Verdict.REFUSED

    run(work())


class Mute:
    """A call that takes everything and answers nothing."""

    def __init__(self) -> None:
        self.is_cancelled = asyncio.Event()

    async def write(self, _request: object) -> None:
        pass

    def cancel(self) -> None:
        self.is_cancelled.set()

    def __aiter__(self) -> "Mute":
        return self

    async def __anext__(self) -> gateway_pb2.KeepResponse:
        await self.is_cancelled.wait()
        raise StopAsyncIteration


def test_a_holder_that_does_not_answer_in_time_is_given_up() -> None:
    async def work() -> None:
        call = Mute()
        stream = KeepStream(call, "gateway-0.1", push_s=0.01)  # type: ignore[arg-type]
        assert await stream.push(shard(), 0.0) is Verdict.REFUSED
        assert stream.is_lost
        assert call.is_cancelled.is_set()
        assert await stream.push(shard(), 0.0) is Verdict.REFUSED

    run(work())
