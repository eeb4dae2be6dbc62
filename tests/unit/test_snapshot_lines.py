"""Snapshots between gateways, over real connections and real gRPC."""

import asyncio
import contextlib
import queue
import random
import socket
import threading
from collections.abc import Iterator

import grpc
import pytest

from cluster import snapshot_lines
from cluster.pb.expertmesh.v1 import gateway_pb2, gateway_pb2_grpc
from cluster.snapshot_lines import CHUNK_BYTES, Line, SnapshotKeeper, SnapshotSender
from cluster.snapshots import SnapshotClient, SnapshotServicer
from tests.unit.harness_gateway import FakeClock
from workers.clock import SystemClock
from workers.gateway.snapshot import Ended, Holder, Shard, Snapshot, Stamp, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.model.packed import PackedShard

RANDOM = random.Random(3)
SMALL = 1000
LARGE = CHUNK_BYTES + 17
BUDGET = 3 * CHUNK_BYTES
WAIT_S = 30.0


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


class Nothing:
    """A prefix cache that keeps none."""

    async def send(self, *_: object) -> bool:
        return False


class Place:
    """A gateway that keeps snapshots, and what its senders are told."""

    def __init__(self) -> None:
        self.store = SnapshotStore(BUDGET, SystemClock())
        self.keeper = SnapshotKeeper(self.store, "127.0.0.1", SystemClock())
        self.holder = Holder("gateway-0.1", f"127.0.0.1:{self.keeper.port}")
        self.told: queue.SimpleQueue[tuple[str, int, Verdict]] = queue.SimpleQueue()

    def sender(self, rank: int = 0) -> SnapshotSender:
        def told(stamp: Stamp, _holder: Holder, verdict: Verdict) -> None:
            self.told.put((stamp.request_id, rank, verdict))

        return SnapshotSender(rank, self.connect, told, SystemClock())

    def connect(self, holder: Holder) -> Line:
        return Line.open("127.0.0.1", int(holder.endpoint.split(":")[1]), self.keeper.key)

    def hear(self) -> tuple[str, int, Verdict]:
        return self.told.get(timeout=WAIT_S)


@pytest.fixture
def place() -> Iterator[Place]:
    found = Place()
    yield found
    found.keeper.close()


def test_parts_of_many_sizes_share_a_line_and_each_gets_its_own_verdict(place: Place) -> None:
    sender = place.sender()
    sizes = [0, SMALL, LARGE, SMALL]
    sent = [shard(num_bytes=n, request_id=f"r{i}") for i, n in enumerate(sizes)]
    for part in (*sent, shard(128, start=64, request_id="no base")):
        sender.push(part, place.holder)
    verdicts = [place.hear() for _ in range(5)]
    assert verdicts == [(f"r{i}", 0, Verdict.COMPLETE) for i in range(4)] + [
        ("no base", 0, Verdict.NO_BASE)
    ]
    for part in sent:
        assert place.store.newest(part.stamp.request_id, 0, 65) == Snapshot(
            stamp=part.stamp, shards=(part.data,)
        )
    sender.close()


def test_a_part_beyond_all_bounds_is_refused_and_the_line_goes_on(place: Place) -> None:
    sender = place.sender()
    sender.push(shard(num_bytes=BUDGET, request_id="huge"), place.holder)
    sender.push(shard(request_id="next"), place.holder)
    assert place.hear() == ("huge", 0, Verdict.REFUSED)
    assert place.hear() == ("next", 0, Verdict.COMPLETE)
    sender.close()


def test_rank_0_hears_that_a_snapshot_is_whole_while_other_parts_pass(place: Place) -> None:
    first, second = place.sender(), place.sender(rank=1)
    first.push(shard(size=2), place.holder)
    first.push(shard(request_id="alone"), place.holder)
    assert place.hear() == ("alone", 0, Verdict.COMPLETE)
    second.push(shard(rank=1, size=2), place.holder)
    assert {place.hear(), place.hear()} == {
        ("r", 1, Verdict.COMPLETE), ("r", 0, Verdict.COMPLETE),
    }  # fmt: skip
    for sender in (first, second):
        sender.close()


def test_rank_0_hears_when_the_other_parts_do_not_come(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_lines, "WHOLE_S", 0.3)
    monkeypatch.setattr(snapshot_lines, "TICK_S", 0.05)
    sender = place.sender()
    sender.push(shard(size=2), place.holder)
    sender.push(shard(request_id="alone"), place.holder)
    assert place.hear() == ("alone", 0, Verdict.COMPLETE)
    assert place.hear() == ("r", 0, Verdict.STORED)
    sender.close()


def test_a_sequence_that_has_left_is_dropped_after_its_last_part(place: Place) -> None:
    sender = place.sender()
    sender.push(shard(), place.holder)
    sender.release(Ended("r", 0, 1, has_ended=True), place.holder)
    sender.push(shard(request_id="other"), place.holder)
    assert [place.hear()[0], place.hear()[0]] == ["r", "other"]
    assert place.store.newest("r", 0, 65) is None
    assert place.store.newest("other", 0, 65) is not None
    sender.close()


def part_message(number: int, kv_bytes: int) -> gateway_pb2.KeepItem:
    head = gateway_pb2.ShardHead(size=1, position=4, kv_bytes=kv_bytes, digest=b"x")
    return gateway_pb2.KeepItem(part=gateway_pb2.KeepPart(head=head, number=number))


def test_damaged_bytes_are_refused_and_the_line_goes_on(place: Place) -> None:
    line = place.connect(place.holder)
    for number in range(2):
        line.write(part_message(number, 4), b"1234")
        answer = line.read(gateway_pb2.KeepAnswer(), ticks=30)
        assert answer is not None
        assert answer.number == number
        assert answer.verdict == gateway_pb2.SNAPSHOT_VERDICT_REFUSED
    line.close()


@pytest.mark.parametrize("wrong", [b"", b"another word"])
def test_who_does_not_know_the_key_is_turned_away(place: Place, wrong: bytes) -> None:
    line = Line.open("127.0.0.1", place.keeper.port, wrong)
    with contextlib.suppress(OSError):
        line.write(part_message(1, 4), b"1234")
    with pytest.raises(OSError, match=r"ended|reset"):
        line.read(gateway_pb2.KeepAnswer(), ticks=30)
    line.close()


def test_what_is_no_message_ends_its_line_alone(place: Place) -> None:
    good = place.connect(place.holder)
    for rubbish in (b"\xff\xff\xff\xff", b"\x03\x00\x00\x00abc"):
        with socket.create_connection(("127.0.0.1", place.keeper.port), timeout=WAIT_S) as other:
            other.sendall(rubbish)
            with contextlib.suppress(ConnectionError):
                assert other.recv(1) == b""
    good.write(part_message(1, 0))
    assert good.read(gateway_pb2.KeepAnswer(), ticks=30) is not None
    good.close()


def test_a_holder_that_is_gone_refuses_and_one_that_is_back_is_found(place: Place) -> None:
    sender = place.sender()
    sender.push(shard(), place.holder)
    assert place.hear() == ("r", 0, Verdict.COMPLETE)
    place.keeper.close()
    nobody = Holder("gateway-5.1", f"127.0.0.1:{place.keeper.port}")
    sender.push(shard(128), nobody)
    assert place.hear() == ("r", 0, Verdict.REFUSED)
    sender.release(Ended("r", 0, 1, has_ended=True), nobody)
    again = Place()
    place.keeper = again.keeper
    sender.push(shard(request_id="again"), again.holder)
    assert place.hear() == ("again", 0, Verdict.COMPLETE)
    sender.close()


def test_what_waits_for_a_holder_out_of_reach_is_refused_without_a_new_try(place: Place) -> None:
    tried: list[Holder] = []
    told: queue.SimpleQueue[Verdict] = queue.SimpleQueue()

    def connect(holder: Holder) -> Line:
        tried.append(holder)
        if holder is not place.holder:
            raise TimeoutError("frozen")
        return place.connect(holder)

    clock = FakeClock()
    sender = SnapshotSender(0, connect, lambda *what: told.put(what[2]), clock)
    frozen = Holder("gateway-7.1", "127.0.0.1:1")
    for _ in range(3):
        sender.push(shard(), frozen)
    sender.push(shard(), place.holder)
    verdicts = [told.get(timeout=WAIT_S) for _ in range(4)]
    assert verdicts == [Verdict.REFUSED] * 3 + [Verdict.COMPLETE]
    assert tried == [frozen, place.holder]
    clock.time_s += snapshot_lines.RETRY_S
    sender.push(shard(), frozen)
    assert told.get(timeout=WAIT_S) is Verdict.REFUSED
    assert tried == [frozen, place.holder, frozen]
    sender.close()


def test_who_is_let_go_refuses_what_was_under_way(place: Place) -> None:
    sender = place.sender()
    sender.push(shard(size=2), place.holder)
    sender.push(shard(request_id="other"), place.holder)
    assert place.hear() == ("other", 0, Verdict.COMPLETE)
    sender.let_go({place.holder.endpoint})
    assert place.told.empty()
    sender.let_go(())
    assert place.hear() == ("r", 0, Verdict.REFUSED)
    sender.close()


@contextlib.contextmanager
def mute_holder() -> Iterator[tuple[SnapshotSender, "queue.SimpleQueue[Verdict]"]]:
    """A sender whose holder takes connections, and then neither reads nor answers."""
    told: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        lines: list[Line] = []

        def connect(_holder: Holder) -> Line:
            lines.append(Line.open("127.0.0.1", port, b"key"))
            return lines[-1]

        sender = SnapshotSender(0, connect, lambda *what: told.put(what[2]), SystemClock())
        yield sender, told
        assert len(lines) == 1
        sender.close()


def test_a_holder_that_does_not_answer_in_time_is_given_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_lines, "ANSWER_S", 0.05)
    monkeypatch.setattr(snapshot_lines, "TICK_S", 0.01)
    with mute_holder() as (sender, told):
        sender.push(shard(), place.holder)
        assert told.get(timeout=WAIT_S) is Verdict.REFUSED


def test_a_holder_that_takes_nothing_is_given_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_lines, "STALL_S", 0.05)
    with mute_holder() as (sender, told):
        sender.push(shard(num_bytes=4 * LARGE), place.holder)  # more than the kernel takes
        assert told.get(timeout=WAIT_S) is Verdict.REFUSED


def test_an_error_in_sending_one_part_is_told_and_does_not_end_the_thread(place: Place) -> None:
    told: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
    broken = Holder("gateway-8.1", "127.0.0.1:1")

    def connect(holder: Holder) -> Line:
        if holder is broken:
            raise ValueError("nobody has thought of this")
        return place.connect(holder)

    sender = SnapshotSender(0, connect, lambda *what: told.put(what[2]), SystemClock())
    sender.push(shard(), broken)
    sender.push(shard(), place.holder)
    assert told.get(timeout=WAIT_S) is Verdict.REFUSED
    assert told.get(timeout=WAIT_S) is Verdict.COMPLETE
    sender.close()


def test_who_has_left_gets_no_new_line(place: Place) -> None:
    sender = place.sender()
    sender.let_go({place.holder.endpoint})
    sender.push(shard(), place.holder)
    assert place.hear() == ("r", 0, Verdict.COMPLETE)
    sender.let_go(())
    sender.push(shard(128, start=64), place.holder)
    assert place.hear() == ("r", 0, Verdict.REFUSED)
    sender.close()


def test_the_keeper_outlives_a_connection_that_it_cannot_take(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError("too many open files"), RuntimeError("can't start new thread")]
    line = snapshot_lines.Line

    def fails(connection: socket.socket) -> Line:
        if failures:
            raise failures.pop()
        return line(connection)

    monkeypatch.setattr(snapshot_lines, "Line", fails)
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", place.keeper.port), timeout=WAIT_S) as lost:
            assert lost.recv(1) == b""
    found = line.open("127.0.0.1", place.keeper.port, place.keeper.key)
    found.write(part_message(1, 0))
    assert found.read(gateway_pb2.KeepAnswer(), ticks=30) is not None
    found.close()


def test_closing_the_keeper_ends_its_threads() -> None:
    place = Place()
    line = place.connect(place.holder)
    line.write(part_message(1, 0))
    assert line.read(gateway_pb2.KeepAnswer(), ticks=30) is not None
    place.keeper.close()
    with pytest.raises(OSError, match="ended"):
        line.read(gateway_pb2.KeepAnswer(), ticks=30)
    line.close()
    for thread in threading.enumerate():
        if thread.name in ("snapshot-line", "snapshot-keeper"):
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.mark.parametrize("num_bytes", [0, SMALL, 2**20, LARGE])
def test_what_is_kept_is_fetched_over_grpc(place: Place, num_bytes: int) -> None:
    sent = shard(num_bytes=num_bytes)
    place.store.put(sent)

    async def work() -> None:
        server = grpc.aio.server()
        servicer = SnapshotServicer(place.store, place.keeper, Nothing(), lambda _: None)
        gateway_pb2_grpc.add_SnapshotServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client, holder = SnapshotClient(), Holder("gateway-0.1", f"127.0.0.1:{port}")
        assert await client.place(holder) == ("127.0.0.1", place.keeper.port, place.keeper.key)
        found = await client.fetch(holder, "r", 0, 65)
        assert found == Snapshot(stamp=sent.stamp, shards=(sent.data,))
        assert await client.fetch(holder, "r", 0, 64) is None
        await client.let_go(())
        await server.stop(grace=None)
        with pytest.raises(OSError, match=r"gateway-0\.1 is out of reach"):
            await client.place(holder)

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


def test_what_is_asked_of_a_gateway_that_leaves_meanwhile_ends_and_cancels_nobody() -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            holder = Holder("gateway-0.1", f"127.0.0.1:{silent.getsockname()[1]}")
            client = SnapshotClient()
            fetching = asyncio.create_task(client.fetch(holder, "r", 0, 65))
            placing = asyncio.create_task(client.place(holder))
            asked = asyncio.create_task(client.place(holder))
            await asyncio.sleep(0)
            asked.cancel()
            await asyncio.sleep(0)
            await client.let_go(())
            assert await fetching is None
            with pytest.raises(ConnectionError, match=r"gateway-0\.1 has left"):
                await placing
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(asyncio.wait_for(work(), WAIT_S))
