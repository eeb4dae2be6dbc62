"""What a gateway of T ranks captured, a gateway of T' ranks goes on from. Real Gloo, real model."""

import threading
from dataclasses import replace

import pytest

from tests.ranks.harness_gateway import (
    DEADLINE_S,
    Answer,
    Gateway,
    Reference,
    mixed_requests,
    options_for,
)
from workers.clock import SystemClock
from workers.gateway.outbox import Keeping
from workers.gateway.snapshot import Ended, Holder, Shard, Snapshot, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.gateway.worker import GatewaySpec, GatewayWorker
from workers.types import FinishReason, Request

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(180)]

INTERVAL = 8
HOLDER = Holder("parent.1", "")


class KeepingBody:
    """A rank whose shards stay in its process until the parent takes them."""

    def __init__(self, spec: GatewaySpec) -> None:
        self.worker = GatewayWorker(spec, keeping=Keeping(self._push, self._release))
        self.worker.keep_with(HOLDER, "w")
        self.shards: list[Shard] = []
        self.ended: list[tuple[Ended, int]] = []  # and how many shards had gone before

    def call(self, method: str, *args):
        return getattr(self.worker, method)(*args)

    def take_shards(self, num_tokens: int) -> list[Shard]:
        """Return all shards, once one comes close to that position."""
        for _ in range(int(DEADLINE_S * 100)):
            if any(s.stamp.position > num_tokens - 2 * INTERVAL for s in list(self.shards)):
                return list(self.shards)
            threading.Event().wait(0.01)
        raise TimeoutError([s.stamp.position for s in self.shards])

    def take_ended(self) -> list[tuple[Ended, int]]:
        """Return the words of ends, once there is one, with the number of shards before each."""
        for _ in range(int(DEADLINE_S * 100)):
            if self.ended:
                return self.ended
            threading.Event().wait(0.01)
        raise TimeoutError

    def run(self, request: Request, snapshots: dict[int, Snapshot], until: int) -> tuple[int, ...]:
        """Run a request until so many tokens are out, those before included."""
        tokens = list(request.emitted[0] if request.emitted else ())
        done = threading.Event()

        def sink(events) -> None:
            for event in events:
                assert event.first_token_index == len(tokens)
                tokens.extend(event.token_ids)
            if len(tokens) >= until:
                done.set()

        self.worker.submit(request, sink, snapshots)
        assert done.wait(DEADLINE_S), (self.worker.failure, self.worker.stats())
        self.worker.abort(request.request_id)
        return tuple(tokens[:until])

    def _release(self, ended: Ended, holder: Holder) -> None:
        assert holder == HOLDER
        self.ended.append((ended, len(self.shards)))

    def _push(self, shard: Shard, holder: Holder) -> None:
        self.shards.append(shard)
        if shard.data.rank == 0:
            self.worker.stored(shard.stamp, holder, Verdict.COMPLETE)


def gateway_of(size: int, *, bit_stable: bool) -> Gateway:
    options = options_for(snapshot_tokens=INTERVAL, bit_stable=bit_stable)
    gateway = Gateway(size, options, body=KeepingBody)
    gateway.start()
    return gateway


@pytest.mark.parametrize("prompt", [0, 3], ids=["1 token", "64 tokens"])
@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_another_gateway_goes_on_from_a_snapshot(writers, readers, prompt) -> None:
    request = replace(mixed_requests(6, longest=60)[prompt], num_sequences=1)
    request = replace(request, stopping=replace(request.stopping, max_tokens=60))
    bit_stable = writers == readers
    store = SnapshotStore(2**30, SystemClock())
    first = gateway_of(writers, bit_stable=bit_stable)
    try:
        tokens = first.ranks[0]("run", request, {}, 30)
        known = len(request.prompt_token_ids) + len(tokens)
        ends = first.all("take_ended")  # nothing of it comes after its end
        shards = [s for part in first.all("take_shards", known) for s in part]
        for shard in sorted(shards, key=lambda s: (s.stamp.position, s.data.rank)):
            store.put(shard)
        ended = Ended(request.request_id, 0, request.assignment, has_ended=False)
        counts = [sum(s.data.rank == rank for s in shards) for rank in range(writers)]
        assert ends == [[(ended, count)] for count in counts]
        if bit_stable:
            undisturbed = first.ranks[0]("run", request, {}, 60)
    finally:
        first.close()
    snapshot = store.newest(request.request_id, 0, known)
    assert known - 2 * INTERVAL < snapshot.stamp.position < known

    second = gateway_of(readers, bit_stable=bit_stable)
    try:
        again = replace(request, assignment=2, emitted=(tokens,))
        answer = second.ranks[0]("run", again, {0: snapshot}, 60)
        stats = second.ranks[0]("call", "stats")
    finally:
        second.close()

    assert stats.restores == 1
    assert stats.replayed_tokens == known - 1 - snapshot.stamp.position
    if bit_stable:
        assert answer == undisturbed
    else:
        key = (request.request_id, 0)
        Reference().check([request], {key: Answer(answer, FinishReason.LENGTH)})
