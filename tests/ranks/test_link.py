"""The contract of a link, for every transport; the two ends are threads here, or processes."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from workers.clock import SystemClock
from workers.dispatch.header import OLDEST_VERSION, VERSION, Frame, Header, Kind
from workers.dispatch.nccl_link import bucket_of
from workers.dispatch.options import LinkTerms
from workers.dispatch.rendezvous import LinkOpener, LinkStore
from workers.errors import DispatchError, LinkClosedError

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(60)]

HOST = "127.0.0.1"
WAIT_S = 20.0
CAPACITY = 64

TRANSPORTS = [
    pytest.param(("gloo", "cpu"), id="gloo"),
    pytest.param(("gloo", "cuda"), id="gloo-pinned", marks=pytest.mark.gpu),
    pytest.param(("nccl", "cuda"), id="nccl", marks=pytest.mark.gpu),
]


def make_terms(transport="gloo", **changes):
    values = {
        "version": VERSION,
        "transport": transport,
        "hidden_size": 24,
        "top_k": 3,
        "dtype": "float32",
        "capacity_rows": CAPACITY,
        "num_buffers": 2,
        "link_timeout_s": WAIT_S,
    }
    return LinkTerms(**(values | changes))


def in_thread(body):
    """Run in a thread; returns a function that waits for the result or raises the error."""
    outcome = []

    def run():
        try:
            outcome.append((body(), None))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(timeout_s=WAIT_S):
        thread.join(timeout_s)
        assert not thread.is_alive()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return result


def open_pair(transport, device, **changes):
    """Open both ends of a link in this process."""
    store = LinkStore.serve(HOST, WAIT_S)
    opener = LinkOpener(HOST, device, WAIT_S, SystemClock())
    terms = make_terms(transport, **changes)
    stop = threading.Event()

    def accept():
        client = LinkStore.connect(f"{HOST}:{store.port}", WAIT_S)
        attempt, offered = opener.await_offer(client, "key", 1, stop)
        return opener.accept(client, "key", attempt, offered, "")

    worker = in_thread(accept)
    gateway = opener.offer(store.clone(), "key", 1, terms, stop)
    return gateway, worker(), store


@pytest.fixture(params=TRANSPORTS)
def pair(request):
    transport, device = request.param
    gateway, worker, store = open_pair(transport, device)
    yield gateway, worker
    gateway.close()
    worker.close()
    del store


def fill(frame, num_rows, seed=0):
    """Random values and words."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(num_rows, frame.values_CH.shape[1], generator=draw)
    frame.values_CH[:num_rows] = values.to(frame.values_CH)
    frame.words_CW[:num_rows] = seed + 1
    if frame.values_CH.is_cuda:
        torch.cuda.synchronize()
    return values


@pytest.mark.parametrize("num_rows", [0, 1, 7, CAPACITY])
def test_rows_and_header_arrive_as_they_were_sent(pair, num_rows):
    gateway, worker = pair
    sent, received = gateway.request_frame(), worker.request_frame()
    values = fill(sent, num_rows)
    header = Header(Kind.DATA, 7, gateway.incarnation, layer=3, num_rows=num_rows, buffer=1)
    got = in_thread(lambda: worker.receive(received))
    gateway.send(sent, header)
    arrived = got()
    assert arrived._replace(capacity=0, payload_checksum=0) == header
    assert torch.equal(received.values_CH[:num_rows].cpu(), values)
    assert (received.words_CW[:num_rows] == 1).all()


def test_both_directions_flow_at_once_and_in_order(pair):
    gateway, worker = pair
    count = 200

    def echo():
        frames = [worker.request_frame() for _ in range(2)]
        replies = [worker.reply_frame() for _ in range(2)]
        for i in range(count):
            header = worker.receive(frames[i % 2])
            assert header.message_id == i
            rows = header.num_rows
            replies[i % 2].values_CH[:rows] = frames[i % 2].values_CH[:rows] * 2
            if replies[0].values_CH.is_cuda:
                torch.cuda.synchronize()
            worker.send(replies[i % 2], header._replace(kind=Kind.REPLY))

    other = in_thread(echo)
    requests = [gateway.request_frame() for _ in range(2)]
    reply = gateway.reply_frame()
    sent = {}

    def send(i):
        rows = 1 + i % CAPACITY
        sent[i] = fill(requests[i % 2], rows, i)
        gateway.send(requests[i % 2], Header(Kind.DATA, i, 1, num_rows=rows, buffer=i % 2))

    send(0)
    for i in range(count):
        if i + 1 < count:
            send(i + 1)  # two under way at once
        header = gateway.receive(reply)
        assert header.message_id == i
        assert torch.equal(reply.values_CH[: header.num_rows].cpu(), sent[i] * 2)
    other()


def test_sending_does_not_wait_for_the_peer_to_receive(pair):
    gateway, _ = pair
    started = time.monotonic()
    gateway.send(gateway.request_frame(), Header(Kind.DATA, 1, 1, num_rows=CAPACITY))
    assert time.monotonic() - started < 1.0


def test_more_rows_than_fit_are_refused_before_anything_is_sent(pair):
    gateway, worker = pair
    received = worker.request_frame()
    got = in_thread(lambda: worker.receive(received))
    with pytest.raises(DispatchError):
        gateway.send(gateway.request_frame(), Header(Kind.DATA, 1, 1, num_rows=CAPACITY + 1))
    gateway.send(gateway.request_frame(), Header(Kind.DATA, 2, 1, num_rows=1))
    assert got().message_id == 2


@pytest.mark.parametrize("closes", ["own", "other"])
def test_closing_either_end_wakes_a_blocked_receiver(pair, closes):
    gateway, worker = pair
    frame = gateway.reply_frame()
    got = in_thread(lambda: gateway.receive(frame))
    time.sleep(0.1)
    (gateway if closes == "own" else worker).close()
    with pytest.raises(LinkClosedError):
        got(5.0)
    with pytest.raises(LinkClosedError):
        gateway.receive(frame)


def test_a_closed_link_sends_nothing_and_closes_again(pair):
    gateway, _ = pair
    gateway.close()
    gateway.close()
    with pytest.raises(LinkClosedError):
        gateway.send(gateway.request_frame(), Header(Kind.DATA, 1, 1))


def test_closing_with_an_undelivered_message_returns_soon(pair):
    gateway, worker = pair
    gateway.send(gateway.request_frame(), Header(Kind.DATA, 1, 1, num_rows=CAPACITY))
    started = time.monotonic()
    gateway.close()
    assert time.monotonic() - started < 2.0
    with pytest.raises(LinkClosedError):
        worker.receive(worker.request_frame())


def test_silence_beyond_the_time_out_breaks_the_link():
    gateway, worker, _store = open_pair("gloo", "cpu", link_timeout_s=0.2)
    with pytest.raises(LinkClosedError):
        gateway.receive(gateway.reply_frame())
    worker.close()


def test_a_damaged_message_breaks_the_link():
    gateway, worker, _store = open_pair("gloo", "cpu", payload_checksum=True)
    frame = gateway.request_frame()
    frame.values_CH.zero_()  # fresh memory may hold what one more does not change
    seal = frame.seal

    def damage(header, **options):
        seal(header, **options)
        frame.values_CH[0, 0] += 1

    frame.seal = damage
    got = in_thread(lambda: worker.receive(worker.request_frame()))
    gateway.send(frame, Header(Kind.DATA, 1, 1, num_rows=2))
    with pytest.raises(DispatchError, match="changed"):
        got()
    with pytest.raises(LinkClosedError):
        gateway.receive(gateway.reply_frame())


def test_a_link_speaks_the_version_of_its_terms():
    gateway, worker, _store = open_pair("gloo", "cpu", version=OLDEST_VERSION)
    got = in_thread(lambda: worker.receive(worker.request_frame()))
    gateway.send(gateway.request_frame(), Header(Kind.DATA, 1, 1, queue_depth=4))
    header = got()
    assert (header.version, header.queue_depth) == (OLDEST_VERSION, 0)
    gateway.close()
    worker.close()


def test_refused_terms_are_told_to_both_sides():
    store = LinkStore.serve(HOST, WAIT_S)
    opener = LinkOpener(HOST, "cpu", WAIT_S, SystemClock())
    stop = threading.Event()
    offer = in_thread(lambda: opener.offer(store.clone(), "key", 1, make_terms(), stop))
    client = LinkStore.connect(f"{HOST}:{store.port}", WAIT_S)
    _, terms = opener.await_offer(client, "key", 1, stop)
    with pytest.raises(DispatchError, match="too wide"):
        opener.accept(client, "key", 1, terms, "too wide")
    with pytest.raises(DispatchError, match="too wide"):
        offer()


def test_an_offer_waits_until_it_is_not_wanted_and_is_passed_over_from_then_on():
    store = LinkStore.serve(HOST, WAIT_S)
    opener = LinkOpener(HOST, "cpu", WAIT_S, SystemClock())
    stop = threading.Event()
    offer = in_thread(lambda: opener.offer(store.clone(), "key", 1, make_terms(), stop))
    time.sleep(0.1)
    stop.set()
    assert offer() is None

    again = threading.Event()
    offer = in_thread(lambda: opener.offer(store.clone(), "key", 2, make_terms(), again))
    client = LinkStore.connect(f"{HOST}:{store.port}", WAIT_S)
    attempt, _ = opener.await_offer(client, "key", 1, again)
    assert attempt == 2
    again.set()
    assert offer() is None


def test_a_store_that_is_not_there_is_told_in_time():
    with pytest.raises(LinkClosedError, match="no link store"):
        LinkStore.connect(f"{HOST}:1", 0.5)


def serve_and_die(port, pipe):
    """The worker's end in a process: receives once, then waits to be killed."""
    opener = LinkOpener(HOST, "cpu", WAIT_S, SystemClock())
    client = LinkStore.connect(f"{HOST}:{port}", WAIT_S)
    _, terms = opener.await_offer(client, "key", 1, threading.Event())
    link = opener.accept(client, "key", 1, terms, "")
    link.receive(link.request_frame())
    pipe.send("received")
    time.sleep(WAIT_S)


def test_death_of_the_peer_is_seen_at_once():
    store = LinkStore.serve(HOST, WAIT_S)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks.test_link"])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_and_die, args=(store.port, theirs), daemon=True)
    process.start()
    opener = LinkOpener(HOST, "cpu", WAIT_S, SystemClock())
    link = opener.offer(store.clone(), "key", 1, make_terms(), threading.Event())
    link.send(link.request_frame(), Header(Kind.DATA, 1, 1, num_rows=3, buffer=0))
    assert ours.poll(WAIT_S)
    got = in_thread(lambda: link.receive(link.reply_frame()))
    time.sleep(0.05)
    killed = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(LinkClosedError):
        got()
    assert time.monotonic() - killed < 5.0
    with pytest.raises(LinkClosedError):
        link.send(link.request_frame(), Header(Kind.DATA, 2, 1, buffer=1))
    process.join(WAIT_S)


@pytest.mark.parametrize(
    ("num_rows", "bucket"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 100), (100, 100)]
)
def test_buckets_are_powers_of_two_up_to_the_capacity(num_rows, bucket):
    assert bucket_of(num_rows, 100) == bucket


def test_frames_have_the_agreed_capacity(pair):
    gateway, _ = pair
    frames = [gateway.request_frame(), gateway.reply_frame()]
    assert all(isinstance(frame, Frame) and frame.capacity == CAPACITY for frame in frames)
    assert gateway.request_frame(0).capacity == 0
