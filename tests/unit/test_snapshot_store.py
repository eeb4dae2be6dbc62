"""What a gateway keeps for others: whole snapshots, the two newest, within its budget."""

from dataclasses import replace

from tests.unit.harness_gateway import FakeClock
from workers.gateway.snapshot import Shard, Stamp, Verdict, digest_of
from workers.gateway.snapshot_store import PENDING, SnapshotStore
from workers.model.packed import PackedShard

ROW = 10
STATES = 100


def shard(
    start: int, position: int, *, rank: int = 0, size: int = 1, assignment: int = 1,
    request_id: str = "r", owner: str = "g0", seed: int = 0,
) -> Shard:  # fmt: skip
    """Rows whose bytes are their position, and states whose bytes are the snapshot's."""
    rows = b"".join(bytes([p + seed + rank * 100] * ROW) for p in range(start, position))
    return Shard(
        stamp=Stamp(
            request_id=request_id, sequence_index=0, assignment=assignment, position=position,
            weights_version="w", tokens=digest_of(range(position)),
        ),
        owner=owner,
        data=PackedShard(
            rank=rank, size=size, start=start, position=position, dtype="float32",
            kv=rows, states=bytes([position]) * STATES,
        ),
    )  # fmt: skip


def make_store(budget: int = 100_000, clock: FakeClock | None = None) -> SnapshotStore:
    return SnapshotStore(budget, clock or FakeClock(), keep_s=10.0)


def positions(store: SnapshotStore, request_id: str = "r") -> list[int]:
    """Every position that can be had, newest first."""
    found, limit = [], 1000
    while (snapshot := store.newest(request_id, 0, limit)) is not None:
        limit = snapshot.stamp.position
        found.append(limit)
    return found


def test_a_snapshot_counts_when_all_ranks_parts_of_it_are_there() -> None:
    store = make_store()
    assert store.put(shard(0, 5, rank=1, size=2)) is Verdict.STORED
    assert positions(store) == []
    assert store.put(shard(0, 5, rank=1, size=2)) is Verdict.STORED  # again
    assert store.put(shard(0, 6, rank=0, size=2)) is Verdict.STORED  # of another position
    assert store.put(shard(0, 5, rank=0, size=2, assignment=2)) is Verdict.STORED  # another owner
    assert positions(store) == []
    assert store.put(shard(0, 5, rank=1, size=2, assignment=2)) is Verdict.COMPLETE

    snapshot = store.newest("r", 0, 6)
    assert [s.rank for s in snapshot.shards] == [0, 1]
    assert snapshot.stamp.assignment == 2
    assert store.is_whole(snapshot.stamp)


def test_parts_whose_other_ranks_are_never_heard_do_not_pile_up() -> None:
    store = make_store()
    for position in range(5, 5 + 3 * PENDING):
        assert store.put(shard(0, position, rank=1, size=2)) is Verdict.STORED
    last = shard(0, 4 + 3 * PENDING, rank=0, size=2)

    assert store.num_bytes <= PENDING * last.data.num_bytes
    assert store.put(last) is Verdict.COMPLETE
    assert positions(store) == [last.stamp.position]


def test_rows_are_put_together_from_what_came_piece_by_piece() -> None:
    store = make_store()
    for start, position in ((0, 5), (5, 9), (9, 14)):
        assert store.put(shard(start, position)) is Verdict.COMPLETE

    for position in (14, 9):
        snapshot = store.newest("r", 0, position + 1)
        assert snapshot.stamp.position == position
        assert snapshot.shards[0].kv == shard(0, position).data.kv
        assert snapshot.shards[0].states == shard(0, position).data.states
        assert snapshot.shards[0].start == 0
    assert positions(store) == [14, 9]  # the two newest, though rows of the third are there


def test_what_is_ahead_of_the_client_is_not_given() -> None:
    store = make_store()
    store.put(shard(0, 5))
    store.put(shard(5, 9))

    assert store.newest("r", 0, 10).stamp.position == 9
    assert store.newest("r", 0, 9).stamp.position == 5
    assert store.newest("r", 0, 5) is None


def test_a_part_whose_base_is_missing_is_refused_and_a_whole_one_begins_anew() -> None:
    store = make_store()
    assert store.put(shard(5, 9)) is Verdict.NO_BASE
    assert store.put(shard(0, 5, rank=0, size=2)) is Verdict.STORED
    assert store.put(shard(5, 9, rank=0, size=2)) is Verdict.NO_BASE  # the base is not whole
    assert store.put(shard(0, 9)) is Verdict.COMPLETE
    assert store.put(shard(9, 12, rank=0, size=2)) is Verdict.NO_BASE  # of fewer ranks
    assert store.put(shard(10, 12)) is Verdict.NO_BASE  # with a gap
    assert positions(store) == [9]


def test_rows_that_come_again_take_the_place_of_those_before() -> None:
    store = make_store()
    store.put(shard(0, 5))
    store.put(shard(5, 9))
    assert store.put(shard(5, 12, seed=40)) is Verdict.COMPLETE
    rows = shard(0, 5).data.kv + shard(5, 12, seed=40).data.kv
    assert store.newest("r", 0, 13).shards[0].kv == rows
    assert store.put(shard(3, 7)) is Verdict.COMPLETE
    assert positions(store) == [7]  # what was behind it is gone
    assert store.newest("r", 0, 8).shards[0].kv == shard(0, 7).data.kv


def test_an_older_assignment_changes_nothing_once_a_newer_one_is_known() -> None:
    store = make_store()
    store.put(shard(0, 5, assignment=1, seed=1))
    assert store.put(shard(0, 3, assignment=2, rank=0, size=2)) is Verdict.STORED
    assert positions(store) == [5]  # until the newer owner has a whole one
    assert store.put(shard(5, 9, assignment=1)) is Verdict.STALE
    assert store.put(shard(0, 3, assignment=2, rank=1, size=2)) is Verdict.COMPLETE
    assert store.put(shard(0, 9, assignment=1)) is Verdict.STALE
    assert positions(store) == [3]


def test_what_has_ended_is_dropped_and_what_was_cancelled_is_kept_for_a_while() -> None:
    clock = FakeClock()
    store = make_store(clock=clock)
    store.put(shard(0, 5, assignment=3))
    store.release(("r", 0), 2, has_ended=True)  # an older owner's word
    assert positions(store) == [5]
    store.release(("r", 0), 3, has_ended=False)
    clock.time_s = 9.0
    store.sweep({"g0"})
    assert positions(store) == [5]
    clock.time_s = 11.0
    store.sweep({"g0"})
    assert positions(store) == []
    store.put(shard(0, 5, assignment=3))
    store.release(("r", 0), 3, has_ended=True)
    assert store.num_bytes == 0


def test_a_sequence_that_was_kept_elsewhere_for_a_while_is_kept_here_again() -> None:
    clock = FakeClock()
    store = make_store(clock=clock)
    store.put(shard(0, 5))
    store.release(("r", 0), 1, has_ended=False)
    store.put(shard(0, 7))
    clock.time_s = 500.0
    store.sweep({"g0"})
    assert positions(store) == [7, 5]


def test_a_dead_owners_snapshots_are_kept_for_a_while() -> None:
    clock = FakeClock()
    store = make_store(clock=clock)
    store.put(shard(0, 5))
    store.put(shard(0, 5, request_id="s", owner="g1"))
    store.sweep({"g1"})
    clock.time_s = 9.0
    store.sweep({"g0", "g1"})  # it was out of sight only
    clock.time_s = 18.0
    store.sweep({"g1"})
    assert positions(store) == [5]
    clock.time_s = 29.0
    store.sweep({"g1"})
    assert positions(store) == []
    assert positions(store, "s") == [5]


def test_the_budget_drives_out_the_cancelled_then_the_oldest() -> None:
    clock = FakeClock()
    one = 5 * ROW + STATES
    store = make_store(3 * one, clock)
    for number in range(3):
        clock.time_s += 1
        store.put(shard(0, 5, request_id=f"r{number}"))
    store.release(("r1", 0), 1, has_ended=False)
    store.put(shard(0, 5, request_id="r3"))
    assert [bool(positions(store, f"r{n}")) for n in range(4)] == [True, False, True, True]
    store.put(shard(0, 5, request_id="r4"))
    assert [bool(positions(store, f"r{n}")) for n in range(5)] == [False, False, True, True, True]
    assert store.num_evicted == 1  # what was cancelled is kept only while there is room
    assert store.num_bytes == 3 * one


def test_what_is_larger_than_the_budget_is_refused() -> None:
    store = make_store(2 * STATES)
    assert store.put(shard(0, 11)) is Verdict.REFUSED
    assert store.put(shard(0, 5)) is Verdict.COMPLETE
    assert store.num_evicted == 1
    assert store.put(shard(5, 9)) is Verdict.REFUSED  # with its predecessor it does not fit
    assert (store.num_bytes, store.num_evicted) == (0, 2)
    wrong = shard(0, 5)
    assert store.put(replace(wrong, data=replace(wrong.data, rank=1))) is Verdict.REFUSED
