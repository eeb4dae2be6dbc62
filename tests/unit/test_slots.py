"""Slots are overwritten only when nobody computes with them."""

import contextlib
import threading

import pytest

from workers.clock import SystemClock
from workers.errors import CheckpointError, DeadlineError
from workers.expert.slots import NO_SLOT, SlotTable
from workers.placement import ExpertId

A, B = ExpertId(0, 1), ExpertId(1, 2)


@pytest.fixture
def table():
    return SlotTable(num_slots=3, num_layers=2, num_experts=4, clock=SystemClock())


@contextlib.contextmanager
def leased(table):
    """Hold a lease and yield its map."""
    lease = table.lease()
    try:
        yield lease.slots_LF
    finally:
        table.give_back(lease)


def put(table, slot, expert, write=lambda: None, verified=True, timeout_s=5.0):
    table.overwrite(slot, expert, write=write, verify=lambda: verified, timeout_s=timeout_s)


def test_an_expert_is_found_under_a_lease_once_it_is_mapped(table):
    with leased(table) as slots_LF:
        assert (slots_LF == NO_SLOT).all()
    put(table, 2, A)
    with leased(table) as slots_LF:
        assert slots_LF[0, 1] == 2
    assert table.held() == {A: 2}


def test_a_lease_sees_the_map_as_it_was(table):
    put(table, 0, A)
    with leased(table) as slots_LF:
        put(table, 1, B)
        assert slots_LF[1, 2] == NO_SLOT


def test_nothing_is_written_under_a_lease(table):
    """The order is unmap, leases back, write, verify, map."""
    put(table, 0, A)
    events = []
    unmapped = threading.Event()

    def overwrite():
        table.overwrite(
            0,
            B,
            write=lambda: events.append(("write", dict(table.held()))),
            verify=lambda: events.append(("verify", dict(table.held()))) is None,
            timeout_s=20.0,
        )
        events.append(("mapped", dict(table.held())))

    thread = threading.Thread(target=overwrite)
    with leased(table) as slots_LF:
        thread.start()
        while table.held():
            unmapped.wait(0.001)
        with leased(table) as later_LF:
            assert later_LF[0, 1] == NO_SLOT, "a new lease no longer sees it"
        assert slots_LF[0, 1] == 0, "the old one still does"
        events.append(("returned", {}))
    thread.join(20)
    assert events == [("returned", {}), ("write", {}), ("verify", {}), ("mapped", {B: 0})]


def test_leases_taken_after_the_unmapping_are_not_waited_for(table):
    put(table, 0, A)
    old, new = leased(table), leased(table)
    old.__enter__()
    thread = threading.Thread(target=put, args=(table, 0, B))
    thread.start()
    pause = threading.Event()
    while table.held():
        pause.wait(0.001)
    new.__enter__()
    old.__exit__(None, None, None)
    thread.join(20)
    assert table.held() == {B: 0}
    new.__exit__(None, None, None)


def test_a_lease_that_is_not_returned_leaves_the_slot_unmapped_and_unwritten(table):
    put(table, 0, A)
    written = []
    with leased(table), pytest.raises(DeadlineError):
        put(table, 0, B, write=lambda: written.append(1), timeout_s=0.01)
    assert not written
    assert not table.held()


def test_what_does_not_verify_is_not_mapped(table):
    with pytest.raises(CheckpointError, match="does not compute"):
        put(table, 0, A, verified=False)
    assert not table.held()


def test_an_expert_that_moved_to_another_slot_stays_when_the_old_one_is_reused(table):
    put(table, 0, A)
    put(table, 1, A)
    put(table, 0, B)
    with leased(table) as slots_LF:
        assert slots_LF[0, 1] == 1
        assert slots_LF[1, 2] == 0


def test_an_expert_is_held_where_it_was_loaded_last_and_nowhere_once_that_is_reused(table):
    put(table, 0, A)
    put(table, 1, A)
    assert table.held() == {A: 1}
    put(table, 1, B)
    assert table.held() == {B: 1}
