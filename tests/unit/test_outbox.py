"""What a rank copied aside goes to its holder in order, and so does the word that it has left."""

import torch

from workers.gateway.capture import Captured, Release
from workers.gateway.outbox import Keeping, Outbox
from workers.gateway.snapshot import Ended, Holder, Shard, Stamp
from workers.model.shards import SequenceShard

HOLDER = Holder("gateway-1.1", "127.0.0.1:1")
ENDED = Ended("r", 0, assignment=1, has_ended=True)


def captured(start: int, position: int) -> Captured:
    stamp = Stamp(
        request_id="r", sequence_index=0, assignment=1, position=position,
        weights_version="w", tokens=b"t",
    )  # fmt: skip
    rows = torch.zeros(position - start, 1, 2, 1, 4)
    return Captured(stamp, HOLDER, start, SequenceShard(rows, torch.zeros(1), torch.zeros(1)))


def test_a_sequences_end_goes_after_all_that_was_taken_of_it() -> None:
    sent: list[int | Ended] = []

    def push(shard: Shard, holder: Holder) -> None:
        assert (shard.owner, shard.data.rank, shard.data.size) == ("gateway-0.1", 1, 2)
        assert holder == HOLDER
        sent.append(shard.data.position)

    def release(ended: Ended, holder: Holder) -> None:
        assert holder == HOLDER
        sent.append(ended)

    outbox = Outbox("gateway-0.1", 1, 2, Keeping(push, release))
    outbox.take(captured(0, 64))
    outbox.take(captured(64, 128))
    outbox.take(Release(ENDED, HOLDER))
    outbox.close(30.0)

    assert sent == [64, 128, ENDED]


def test_what_cannot_be_packed_is_told_and_does_not_end_the_thread() -> None:
    sent: list[int] = []
    failed: list[tuple[Stamp, Holder]] = []
    keeping = Keeping(
        lambda shard, _: sent.append(shard.data.position),
        failed=lambda stamp, holder: failed.append((stamp, holder)),
    )
    broken = Captured(captured(0, 1).stamp, HOLDER, 0, None)
    outbox = Outbox("gateway-0.1", 0, 1, keeping)
    outbox.take(broken)
    outbox.take(captured(0, 64))
    outbox.close(30.0)

    assert failed == [(broken.stamp, HOLDER)]
    assert sent == [64]
