"""What Gloo does, where it surprises: the links rely on each of these, and guard against most.

When one of these fails after an upgrade of torch, read workers/dispatch/gloo_link.py again.
"""

import multiprocessing
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from workers.mesh import make_gloo_device, make_gloo_group

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(60)]

HOST = "127.0.0.1"
WAIT_S = 20.0
SOON_S = 5.0  # far beyond what the events below take, far below the time-outs of the groups


def make_store():
    return dist.TCPStore(
        HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=WAIT_S)
    )


def join_group(port, rank, prefix="traps"):
    store = dist.TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=WAIT_S))
    return make_gloo_group(dist.PrefixStore(prefix, store), rank, 2, HOST, WAIT_S, num_threads=0)


def num_threads():
    """Threads of this process, those of C++ too."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def seconds(body):
    """How long a call took, and the error that it raised."""
    started = time.monotonic()
    try:
        body()
    except RuntimeError as error:
        return time.monotonic() - started, error
    return time.monotonic() - started, None


@pytest.fixture
def both():
    """Both ends of a group in one process."""
    store = make_store()
    ends = [None, None]

    def join(rank):
        ends[rank] = join_group(store.port, rank)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    yield ends
    ends.clear()


class Peer:
    """Rank 1 in a process of its own, which does one thing and then waits."""

    def __init__(self, body):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks.test_gloo_traps"])
        self.store = make_store()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_peer, args=(self.store.port, body, theirs))
        self.process.start()
        self.group = join_group(self.store.port, 0)

    def told(self):
        assert self.pipe.poll(WAIT_S)
        return self.pipe.recv()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join(WAIT_S)


def _peer(port, body, pipe):
    group = join_group(port, 1)
    kept = body(group, pipe)
    time.sleep(WAIT_S)
    del kept


def idle(group, pipe):
    pipe.send("here")


def sends_a_lot(group, pipe):
    work = group.send([torch.zeros(1 << 27, dtype=torch.uint8)], 0, 0)
    pipe.send("sent")
    return work


def receives_eight_bytes(group, pipe):
    work = group.recv([torch.zeros(8, dtype=torch.uint8)], 0, 0)
    pipe.send("posted")
    work.wait()
    pipe.send("received")


def drops_a_receive(group, pipe):
    group.recv([torch.zeros(1 << 20, dtype=torch.uint8)], 0, 0)
    pipe.send("dropped")
    work = group.recv([torch.zeros(1 << 20, dtype=torch.uint8)], 0, 0)
    _, error = seconds(lambda: work.wait(timedelta(seconds=0.5)))
    pipe.send(error is not None)


def test_the_private_names_are_there():
    options = dist.ProcessGroupGloo._Options()
    device = make_gloo_device(HOST)
    options._devices = [device]
    options._threads = 0
    options._timeout = timedelta(seconds=1)
    assert options._timeout == timedelta(seconds=1)
    store = make_store()
    group = make_gloo_group(store, 0, 1, HOST, WAIT_S, device=device, num_threads=0)
    assert group.size() == 1
    assert store.clone().port == store.port


def test_links_of_a_process_share_one_device_thread():
    device = make_gloo_device(HOST)
    store = make_store()
    before = num_threads()
    groups = [
        make_gloo_group(
            dist.PrefixStore(str(i), store), 0, 1, HOST, WAIT_S, device=device, num_threads=0
        )
        for i in range(5)
    ]
    assert num_threads() <= before + 1
    del groups


def test_there_is_no_poll_a_work_never_says_that_it_is_complete(both):
    a, b = both
    tensor = torch.zeros(4)
    work = a.recv([tensor], 1, 0)
    b.send([torch.ones(4)], 0, 0).wait()
    time.sleep(0.1)
    assert not work.is_completed()
    work.wait()
    assert tensor.sum() == 4


def test_a_wait_that_times_out_closes_the_link_for_good(both):
    a, b = both
    with pytest.raises(RuntimeError):
        a.recv([torch.zeros(1)], 1, 0).wait(timedelta(milliseconds=1))
    took, error = seconds(lambda: a.send([torch.zeros(1)], 1, 0).wait(timedelta(seconds=WAIT_S)))
    assert error is not None
    took, error = seconds(lambda: b.recv([torch.zeros(1)], 0, 0).wait(timedelta(seconds=WAIT_S)))
    assert error is not None
    assert took < SOON_S


def test_a_receive_on_another_tag_that_times_out_wakes_a_blocked_one(both):
    a, _ = both
    blocked = a.recv([torch.zeros(1)], 1, 0)
    outcome = []
    thread = threading.Thread(
        target=lambda: outcome.append(seconds(lambda: blocked.wait(timedelta(seconds=WAIT_S))))
    )
    thread.start()
    time.sleep(0.05)
    closing = a.recv([torch.zeros(1)], 1, 1)
    with pytest.raises(RuntimeError):
        closing.wait(timedelta(milliseconds=1))
    thread.join(WAIT_S)
    took, error = outcome[0]
    assert error is not None
    assert took < SOON_S


def test_a_shorter_message_leaves_the_rest_of_the_buffer_alone(both):
    a, b = both
    buffer = torch.full((8,), 7, dtype=torch.uint8)
    work = a.recv([buffer], 1, 0)
    b.send([torch.zeros(3, dtype=torch.uint8)], 0, 0).wait()
    work.wait()
    assert buffer.tolist() == [0, 0, 0, 7, 7, 7, 7, 7]


def test_a_longer_message_aborts_the_process_that_receives_it():
    with Peer(receives_eight_bytes) as peer:
        assert peer.told() == "posted"
        work = peer.group.send([torch.zeros(64, dtype=torch.uint8)], 1, 0)
        peer.process.join(WAIT_S)
        assert peer.process.exitcode == -signal.SIGABRT
        seconds(lambda: work.wait(timedelta(milliseconds=1)))


def test_a_work_that_is_dropped_before_it_is_done_wedges_the_link():
    with Peer(drops_a_receive) as peer:
        assert peer.told() == "dropped"
        works = [peer.group.send([torch.zeros(1 << 20, dtype=torch.uint8)], 1, 0) for _ in range(2)]
        assert peer.told(), "the second receive got its message: Works need not be kept"
        for work in works:
            seconds(lambda work=work: work.wait(timedelta(milliseconds=1)))


def test_sending_returns_at_once_though_the_peer_is_stopped():
    with Peer(idle) as peer:
        assert peer.told() == "here"
        peer.signal(signal.SIGSTOP)
        works = []
        took, error = seconds(lambda: works.append(peer.group.send([torch.zeros(1 << 26)], 1, 0)))
        assert error is None
        assert took < SOON_S
        seconds(lambda: works[0].wait(timedelta(milliseconds=1)))


def test_death_of_the_peer_ends_a_wait_and_every_later_call():
    with Peer(idle) as peer:
        assert peer.told() == "here"
        work = peer.group.recv([torch.zeros(1)], 1, 0)
        peer.signal(signal.SIGKILL)
        took, error = seconds(lambda: work.wait(timedelta(seconds=WAIT_S)))
        assert error is not None
        assert took < SOON_S
        _, error = seconds(lambda: peer.group.send([torch.zeros(1)], 1, 0))
        assert error is not None


def test_a_stopped_peer_is_not_noticed_before_the_time_out():
    with Peer(idle) as peer:
        assert peer.told() == "here"
        peer.signal(signal.SIGSTOP)
        work = peer.group.recv([torch.zeros(1)], 1, 0)
        took, error = seconds(lambda: work.wait(timedelta(seconds=0.4)))
        assert error is not None
        assert took >= 0.4


def test_half_a_message_hangs_the_receiver_until_its_time_out():
    with Peer(sends_a_lot) as peer:
        assert peer.told() == "sent"
        buffer = torch.full((1 << 27,), 255, dtype=torch.uint8)
        work = peer.group.recv([buffer], 1, 0)
        while buffer[0] == 255:
            time.sleep(0.0005)
        peer.signal(signal.SIGKILL)
        peer.process.join(WAIT_S)
        assert buffer[-1] == 255, "the message was here before the kill: send a longer one"
        took, error = seconds(lambda: work.wait(timedelta(seconds=1.0)))
        assert error is not None
        assert took >= 0.9, "the death was reported: is the deadline still needed?"


def test_a_constructor_without_a_peer_ends_by_its_time_out():
    store = make_store()
    took, error = seconds(lambda: make_gloo_group(store, 0, 2, HOST, 0.3, num_threads=0))
    assert error is not None
    assert took < SOON_S


def test_set_ups_on_clones_of_a_store_do_not_wait_for_each_other():
    store = make_store()
    waits = threading.Thread(
        target=lambda: seconds(
            lambda: make_gloo_group(
                dist.PrefixStore("nobody", store.clone()), 0, 2, HOST, 2.0, num_threads=0
            )
        )
    )
    waits.start()
    time.sleep(0.1)
    ends = []  # kept: one that is dropped early breaks off the set-up of the other
    other = threading.Thread(target=lambda: ends.append(join_group(store.port, 1, "both")))
    other.start()
    took, error = seconds(
        lambda: ends.append(
            make_gloo_group(
                dist.PrefixStore("both", store.clone()), 0, 2, HOST, WAIT_S, num_threads=0
            )
        )
    )
    assert error is None
    assert took < 1.5
    other.join(WAIT_S)
    waits.join(WAIT_S)
    assert len(ends) == 2


def test_an_open_link_outlives_its_store(both):
    a, b = both  # the fixture's store is gone with its only reference here
    work = a.recv([torch.zeros(1)], 1, 0)
    b.send([torch.ones(1)], 0, 0).wait()
    work.wait()


def test_dropping_an_idle_group_is_seen_by_the_peer(both):
    a = both.pop(0)
    b = both[0]
    work = b.recv([torch.zeros(1)], 0, 0)
    del a
    took, error = seconds(lambda: work.wait(timedelta(seconds=WAIT_S)))
    assert error is not None
    assert took < SOON_S


def test_one_sender_and_one_receiver_thread_share_a_link(both):
    a, b = both
    count = 300

    def pump(group, peer):
        works = [group.send([torch.full((16,), float(i))], peer, 0) for i in range(count)]
        for work in works:
            work.wait()

    senders = [
        threading.Thread(target=pump, args=(a, 1)),
        threading.Thread(target=pump, args=(b, 0)),
    ]
    for sender in senders:
        sender.start()
    wrong = 0
    for i in range(count):
        for group, peer in ((a, 1), (b, 0)):
            got = torch.zeros(16)
            group.recv([got], peer, 0).wait()
            wrong += bool((got != i).any())
    for sender in senders:
        sender.join(WAIT_S)
    assert wrong == 0


def test_messages_of_nothing_and_of_every_dtype_pass(both):
    a, b = both
    for dtype in (torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.int32):
        for size in (0, 5):
            got = torch.zeros(size).to(dtype)
            work = a.recv([got], 1, 0)
            b.send([torch.ones(size).to(dtype)], 0, 0).wait()
            work.wait()
            assert got.float().sum() == size
