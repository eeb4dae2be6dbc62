"""Judging a history: lost, refused, short, out of order, and how long a fault held clients up."""

import asyncio
import contextlib
from collections import Counter

import pytest

from cluster.chaos.cable import Cable
from cluster.chaos.faults import Done, Fault, draw_faults
from cluster.chaos.history import Answer, Arrival, Ask, problems_of
from cluster.chaos.load import draw_ask, legs_of
from cluster.chaos.plot import plot_stalls
from cluster.chaos.run import ChaosOptions, Run, report_of
from cluster.chaos.stalls import NOTHING, Window, percentile, stalls_by_kind
from cluster.cli.chaos import table_of

ASK = Ask(
    number=3, prompt_token_ids=(1,), max_tokens=4, temperature=0.0, top_p=1.0, seed=1,
    num_sequences=1,
)  # fmt: skip


def answer(times=(1.0, 1.1, 1.2, 1.3), *, first=None, finish="LENGTH", error="") -> Answer:
    first = range(len(times)) if first is None else first
    arrivals = [Arrival(t, i, (7,)) for t, i in zip(times, first, strict=True)]
    return Answer(ASK, 0.5, {0: arrivals} if arrivals else {}, {0: finish} if finish else {}, error)


def test_a_whole_answer_has_no_problem() -> None:
    assert problems_of([answer()]).count == 0


@pytest.mark.parametrize(
    ("harmed", "kind"),
    [
        (answer(error="INTERNAL: gone", finish=""), "lost"),
        (answer((), error="INTERNAL: gone", finish=""), "lost"),
        (answer((), error="RESOURCE_EXHAUSTED: full", finish=""), "refused"),
        (answer(error="UNAVAILABLE: no gateway", finish=""), "lost"),
        (answer(first=(0, 1, 3, 4)), "out_of_order"),
        (answer(first=(0, 1, 1, 2)), "out_of_order"),
        (answer((1.0, 1.1)), "short"),
        (answer(finish="STOP"), "short"),
        (answer((), finish=""), "short"),
    ],
)
def test_each_harm_is_named(harmed: Answer, kind: str) -> None:
    found = problems_of([answer(), harmed])

    assert len(getattr(found, kind)) >= 1
    assert "request 3" in getattr(found, kind)[0]


def test_a_stall_is_the_longest_gap_in_the_window_less_the_normal_one() -> None:
    times = [i / 10 for i in range(10)] + [1.5 + i / 10 for i in range(10)]

    (stalls,) = stalls_by_kind([answer(times)], [Window("kill", 1.0, 1.2)])

    assert stalls.kind == "kill"
    assert stalls.sequences_s == pytest.approx((0.5,))
    assert stalls.worst_s == pytest.approx((0.5,))


def test_an_answer_knows_how_far_it_was() -> None:
    assert [answer().num_tokens_at(t) for t in (0.9, 1.0, 1.25, 9.0)] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("metadata", "legs"),
    [
        ((("expertmesh-route", "a.1@0 b.2@57"),), [("a.1", 0), ("b.2", 57)]),
        ((("other", "x"),), []),  # of a front door that does not tell
        (None, []),
    ],
)
def test_a_call_tells_which_gateways_had_it(metadata, legs) -> None:
    assert legs_of(metadata) == legs


def test_an_answer_knows_where_it_left_a_gateway() -> None:
    moved = answer()
    moved.legs = [("a.1", 0), ("b.2", 57), ("c.1", 60)]
    assert [moved.left_at(name) for name in ("a.1", "b.2", "c.1", "d.1")] == [57, 60, None, None]


def test_a_sequence_that_did_not_run_then_has_no_stall() -> None:
    (stalls,) = stalls_by_kind([answer()], [Window("kill", 5.0, 6.0)])

    assert stalls.sequences_s == ()


def test_quiet_time_between_faults_is_measured_in_windows_of_the_same_length() -> None:
    times = [i / 10 for i in range(100)]
    windows = [Window("kill", 1.0, 2.0), Window("kill", 5.5, 6.5)]

    quiet = next(s for s in stalls_by_kind([answer(times)], windows) if s.kind == NOTHING)

    assert len(quiet.worst_s) == 3
    assert max(quiet.worst_s) < 0.01


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(v) for v in range(1, 101)]

    assert [percentile(values, p) for p in (50, 99, 100)] == [50.0, 99.0, 100.0]
    assert percentile([], 50) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_no_worker_is_drained_that_has_not_joined(seed: int) -> None:
    counts = {Fault.JOIN: 5, Fault.DRAIN: 5, Fault.KILL: 7}
    faults = draw_faults(counts, seed)

    assert {kind: faults.count(kind) for kind in counts} == counts
    joined = 0
    for fault in faults:
        joined += {Fault.JOIN: 1, Fault.DRAIN: -1}.get(fault, 0)
        assert joined >= 0


def test_the_load_is_the_seeds() -> None:
    asks = [draw_ask(5, n, 1000) for n in range(40)]

    assert asks == [draw_ask(5, n, 1000) for n in range(40)]
    assert {a.temperature == 0 for a in asks} == {True, False}
    assert len({a.max_tokens for a in asks}) > 2
    assert {a.num_sequences for a in asks} == {1, 2}


@pytest.fixture
def run() -> Run:
    times = [i / 10 for i in range(30)]
    done = [Done(Window("kill", 1.0, 2.0), ("w",), 0.5)]
    return Run([answer(times)], done, Counter({0: 3, 3: 1}))


def test_the_report_says_how_soon_lost_rows_were_made_good(run) -> None:
    report = report_of(run, ChaosOptions(counts={Fault.KILL: 1}), None)

    assert report["recoveries_s"]["layers"][:5] == [3, 0, 0, 1, 0]
    caption = table_of(report).caption
    assert (
        caption
        == "4 layers lost rows; complete after the loss was noticed: 75.0% in 2 ms, 100.0% in 20 ms"
    )
    late = table_of({**report, "longest_deadline_s": 2.0}).caption
    assert late.endswith("\nthe longest deadline that a worker missed was 2.000 s")


def test_the_plot_is_a_picture(run, tmp_path) -> None:
    plot_stalls(run, tmp_path / "stalls.svg")

    assert "<svg" in (tmp_path / "stalls.svg").read_text()


@pytest.mark.parametrize("one_end", [False, True])
async def test_a_cable_passes_bytes_until_it_is_cut_at_one_end_or_both(one_end) -> None:
    has_left = asyncio.Event()

    async def echo(reader, writer) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(100):
                writer.write(data)
        has_left.set()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    cable = Cable(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    host, _, port = (await cable.lay()).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"

    assert cable.cut(one_end=one_end) == 1
    with contextlib.suppress(OSError):
        assert await reader.read() == b""
    if one_end:
        await asyncio.sleep(0)
        assert not has_left.is_set()
    else:
        await asyncio.wait_for(has_left.wait(), 5.0)
    writer.close()
    await cable.close()
    await asyncio.wait_for(has_left.wait(), 5.0)
    server.close()


async def test_a_cable_leads_each_connection_where_it_is_told_and_is_cut_by_where_that_is() -> None:
    async def stay(reader, writer) -> None:
        writer.write(b"x")
        await reader.read()
        writer.close()

    servers = [await asyncio.start_server(stay, "127.0.0.1", 0) for _ in range(2)]
    ways = [f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    turns = iter(ways)
    cable = Cable(lambda: next(turns))
    host, _, port = (await cable.lay()).rpartition(":")
    ends = []
    for _ in ways:
        ends.append(await asyncio.open_connection(host, int(port)))
        assert await ends[-1][0].read(1) == b"x"

    assert cable.cut(one_end=True, to=ways[0]) == 1
    assert cable.endpoints == ways[1:]
    with contextlib.suppress(OSError):
        assert await asyncio.wait_for(ends[0][0].read(), 5.0) == b""
    for _, writer in ends:
        writer.close()
    await cable.close()
    for server in servers:
        server.close()


async def test_a_silent_cable_passes_nothing_and_tells_nobody() -> None:
    heard = []

    async def echo(reader, writer) -> None:
        while data := await reader.read(100):
            heard.append(data)
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    cable = Cable(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    host, _, port = (await cable.lay()).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"before")
    assert await reader.readexactly(6) == b"before"

    assert cable.silence() == 1
    writer.write(b"after")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(), 0.1)
    assert (heard, cable.endpoints, cable.cut()) == ([b"before"], [], 0)
    writer.close()
    await cable.close()
    server.close()


async def test_a_cable_tells_a_client_that_the_front_door_has_gone() -> None:
    async def leave(_reader, writer) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(leave, "127.0.0.1", 0)
    cable = Cable(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    host, _, port = (await cable.lay()).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(OSError):
        assert await asyncio.wait_for(reader.read(), 5.0) == b""
    writer.close()
    await cable.close()
    server.close()
