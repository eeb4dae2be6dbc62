"""Prefixes between gateways, over real gRPC and real connections."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace

import grpc
import pytest

from cluster import snapshots
from cluster.pb.expertmesh.v1 import gateway_pb2_grpc
from cluster.prefixes import AWAY_S, MOST_SENDS, PrefixSender, PrefixSource
from cluster.snapshot_lines import Line, SnapshotKeeper, SnapshotSender
from cluster.snapshots import SnapshotClient, SnapshotServicer, SnapshotSource
from tests.unit.harness_gateway import FakeClock, make_request
from workers.clock import SystemClock
from workers.gateway.prefix_digest import prefix_digest
from workers.gateway.snapshot import Ended, Holder, Shard, Stamp, Verdict, digest_of
from workers.gateway.snapshot_store import SnapshotStore
from workers.model.packed import PackedShard
from workers.types import PrefixPlace, Request

WAIT_S = 20.0
BUDGET = 2**20
PROMPT = tuple(range(100))
KEPT = PROMPT[:64]
DIGEST = prefix_digest("salt", KEPT)
GIVER, RECEIVER = "gateway-0.1", "gateway-1.1"


def ask(request_id: str = "r", num_sequences: int = 1) -> Request:
    request = make_request(request_id, PROMPT, cache_salt="salt", num_sequences=num_sequences)
    return replace(request, prefix=PrefixPlace(len(KEPT), GIVER))


def drop(_stamp: Stamp, _holder: Holder, _verdict: Verdict) -> None:
    """Rank 0 hears when the parts of all ranks are there."""


class Giver:
    """A gateway of `size` ranks with a kept prefix; its parts go out when the test says so."""

    def __init__(self, size: int = 1) -> None:
        self.asked: list[str] = []
        self.answers = True  # or its step is stuck
        self.most_bytes = 0
        self.heard = asyncio.Semaphore(0)  # for each that was asked
        self.is_open = asyncio.Event()
        self.receiver = Holder(RECEIVER, "nowhere")  # as the View has it
        self.prefixes = PrefixSender(self)
        self._size = size
        self._loop = asyncio.get_running_loop()
        self._senders = [
            SnapshotSender(rank, self.connect, self.told if rank == 0 else drop, SystemClock())
            for rank in range(size)
        ]
        self.line: tuple[str, int, bytes] = ("", 0, b"")

    def connect(self, _holder: Holder) -> Line:
        return Line.open(*self.line)

    def told(self, stamp: Stamp, _holder: Holder, verdict: Verdict) -> None:
        if self.prefixes.sends(stamp.request_id):
            self._loop.call_soon_threadsafe(self.prefixes.told, stamp.request_id, verdict)

    def keeps_prefix(self, digest: int) -> bool:
        return digest == DIGEST

    def send_prefix(
        self, digest: int, name: str, receiver: Holder, most_bytes: int
    ) -> "Future[bool]":
        is_kept: Future[bool] = Future()
        self.asked.append(name)
        self.most_bytes = most_bytes
        self.heard.release()
        if not self.answers:
            return is_kept
        is_kept.set_result(digest == DIGEST)
        if digest == DIGEST:
            self._loop.create_task(self._send(name, receiver))
        return is_kept

    async def _send(self, name: str, receiver: Holder) -> None:
        await self.is_open.wait()
        stamp = Stamp(
            request_id=name, sequence_index=0, assignment=1, position=len(KEPT),
            weights_version="w", tokens=digest_of(KEPT),
        )  # fmt: skip
        for rank, sender in enumerate(self._senders):
            data = PackedShard(
                rank=rank, size=self._size, start=0, position=len(KEPT), dtype="float32",
                kv=bytes(8 * len(KEPT)), states=b"state",
            )  # fmt: skip
            sender.push(Shard(stamp=stamp, owner=GIVER, data=data), receiver)
            sender.release(Ended(name, 0, 1, has_ended=False), receiver)

    def close(self) -> None:
        for sender in self._senders:
            sender.close()


class Site:
    """A gateway that fetches from a giver."""

    def __init__(self, giver: Giver, keeper: SnapshotKeeper, store: SnapshotStore) -> None:
        self.giver, self.store = giver, store
        self.client = SnapshotClient()
        self.keeps: set[int] = set()
        self.clock = FakeClock()
        prefixes = PrefixSource(RECEIVER, self, store, self.client, self.clock)
        self.source = SnapshotSource(RECEIVER, store, self.client, prefixes)
        giver.line = "127.0.0.1", keeper.port, keeper.key

    def keeps_prefix(self, digest: int) -> bool:
        return digest in self.keeps

    def send_prefix(
        self, digest: int, name: str, receiver: Holder, most_bytes: int
    ) -> "Future[bool]":
        raise AssertionError("nobody asks the receiver")


@contextlib.asynccontextmanager
async def site(size: int = 1) -> AsyncIterator[Site]:
    store, giver = SnapshotStore(BUDGET, SystemClock()), Giver(size)
    keeper = SnapshotKeeper(store, "127.0.0.1", SystemClock())
    made = Site(giver, keeper, store)
    server = grpc.aio.server()
    servicer = SnapshotServicer(
        store, keeper, giver.prefixes, lambda m: giver.receiver if m == RECEIVER else None
    )
    gateway_pb2_grpc.add_SnapshotServiceServicer_to_server(servicer, server)
    made.source.endpoints = {GIVER: f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"}
    await server.start()
    try:
        async with asyncio.timeout(WAIT_S):
            yield made
    finally:
        await made.client.let_go(())
        await server.stop(grace=None)
        giver.close()
        keeper.close()


@pytest.mark.parametrize("size", [1, 2])
async def test_a_prefix_is_there_once_all_ranks_have_sent_it_and_leaves_nothing_behind(size):
    async with site(size) as here:
        here.giver.is_open.set()
        found = await here.source.find(ask(num_sequences=2))
        assert found[0] is found[1]
        assert found[0].fits(PROMPT, "w")
        assert not found[0].is_of("r")
        assert [shard.rank for shard in found[0].shards] == list(range(size))
        assert here.store.num_bytes == 0


async def test_requests_that_come_together_fetch_it_once_and_one_that_leaves_disturbs_none():
    async with site() as here:
        first, second, third = (
            asyncio.create_task(here.source.find(ask(f"r{i}"))) for i in range(3)
        )
        await here.giver.heard.acquire()
        first.cancel()
        here.giver.is_open.set()
        assert (await second)[0] is (await third)[0]
        assert first.cancelled()
        assert len(here.giver.asked) == 1
        assert here.giver.most_bytes == BUDGET


async def test_a_request_shares_what_another_one_waits_with_and_nothing_stays_after_them():
    async with site() as here:
        here.giver.is_open.set()
        found = await here.source.find(ask("r"))
        is_same = (await here.source.find(ask("s")))[0] is found[0]
        assert is_same
        assert len(here.giver.asked) == 1
        found.clear()
        await asyncio.sleep(0)  # what has woken this task holds what it brought
        gc.collect()
        await here.source.find(ask("t"))
        assert len(here.giver.asked) == 2


async def test_what_waits_takes_room_and_what_is_kept_here_is_not_fetched():
    async with site() as here:
        here.giver.is_open.set()
        found = await here.source.find(ask())
        other = replace(ask(), cache_salt="other")
        assert await here.source.find(other) == {}
        assert here.giver.most_bytes == BUDGET - found[0].num_bytes
        here.keeps.add(DIGEST)
        assert await here.source.find(ask()) == {}
        assert len(here.giver.asked) == 2


async def test_a_gateway_whose_steps_are_stuck_is_waited_for_once(monkeypatch):
    monkeypatch.setattr(snapshots, "_PREFIX_S", 0.2)
    async with site() as here:
        here.giver.answers = False
        assert await here.source.find(ask()) == {}
        here.giver.answers = True
        here.giver.is_open.set()
        assert await here.source.find(ask()) == {}
        assert len(here.giver.asked) == 1
        here.clock.time_s = AWAY_S + 1
        assert await here.source.find(ask())


async def test_what_cannot_be_had_is_computed():
    async with site() as here:
        here.giver.is_open.set()
        of_another_tenant = replace(ask(), cache_salt="other")
        assert await here.source.find(of_another_tenant) == {}
        of_nobody = replace(ask(), prefix=PrefixPlace(64, "gateway-7.1"))
        assert await here.source.find(of_nobody) == {}
        here.giver.line = "127.0.0.1", 1, b""  # the receiver is out of the giver's reach
        assert await here.source.find(ask()) == {}
        here.source.endpoints = {GIVER: "127.0.0.1:1"}
        assert await here.source.find(ask()) == {}
        assert here.giver.asked  # some of them


async def test_a_gateway_sends_few_at_once_and_only_to_gateways():
    async with site() as here:
        client, holder = here.client, Holder(GIVER, here.source.endpoints[GIVER])

        def fetch(name: str, receiver: str = RECEIVER):
            return client.send_prefix(holder, DIGEST, name, receiver, BUDGET)

        assert not await fetch("a stranger's", "gateway-8.1")
        running = [asyncio.create_task(fetch(f"n{i}")) for i in range(MOST_SENDS)]
        for _ in running:
            await here.giver.heard.acquire()
        assert not await fetch("one too many")
        running.pop().cancel()  # nobody waits for it, and its bytes are on their way still
        assert not await fetch("one too many")
        here.giver.is_open.set()
        assert await asyncio.gather(*running) == [True] * (MOST_SENDS - 1)
        assert await fetch("next")
