"""What a controller decides counts once it is journalled, and its successor finds all of it."""

import pytest

from cluster.control.ports import Opened, ProcessId, Pulse
from tests.unit.test_controller import Bench
from workers.errors import UnavailableError
from workers.placement import MemberState, Role


def test_without_a_journal_nothing_is_done_and_the_status_says_why() -> None:
    bench = Bench()
    bench.journal.trouble = OSError("no space left")
    bench.ticks()

    assert not bench.runtime.specs
    assert not bench.runtime.calls
    assert any("no space left" in reason for reason in bench.controller.status().reasons)

    bench.journal.trouble = None
    bench.ticks()
    assert bench.controller.status().ready


def test_a_death_while_the_journal_is_away_is_mended_when_it_is_back() -> None:
    bench = Bench(floor=2)
    bench.ticks()
    (victim,) = bench.runtime.named("expert_worker-1")
    bench.journal.trouble = OSError("stale file handle")
    bench.runtime.die(victim)
    bench.ticks()
    with pytest.raises(UnavailableError, match="stale file handle"):
        bench.controller.scale(Role.EXPERT_WORKER, 4)

    bench.journal.trouble = None
    bench.ticks(20)
    assert bench.controller.status().ready
    assert len(bench.workers()) == 4  # also what was asked for meanwhile


def test_nobody_is_given_up_for_a_silence_in_which_nobody_was_asked() -> None:
    bench = Bench(workers=4, floor=2)
    bench.ticks()
    append = bench.journal.append

    def full(record) -> None:
        raise OSError("no space left")

    bench.journal.append = full
    (victim,) = bench.runtime.named("expert_worker-1")
    bench.runtime.die(victim)
    bench.ticks(200)  # a minute
    living = set(bench.runtime.specs)
    slow = bench.runtime.named("gateway-0")
    bench.runtime.mute |= {(process, "pulse") for process in slow}

    bench.journal.append = append
    bench.ticks(10)
    assert living <= bench.runtime.specs.keys()
    bench.runtime.mute.clear()
    for process in slow:
        bench.runtime.say(process, "pulse", Pulse(ready=True))
    bench.ticks(20)
    assert bench.controller.status().ready


class Crash(Exception):  # noqa: N818 - not an error of the product
    """The controller's process ends."""


@pytest.mark.parametrize("crash_at", range(1, 7))
def test_a_successor_knows_of_all_that_was_begun_wherever_the_first_one_ended(crash_at) -> None:
    bench = Bench(workers=3, slots=8)
    append, count = bench.journal.append, 0

    def crash(record) -> None:
        nonlocal count
        count += 1
        if count == crash_at:
            raise Crash
        append(record)

    bench.journal.append = crash
    with pytest.raises(Crash):
        bench.ticks(30)
    known = {member.id for view in bench.journal.views[-1:] for member in view.members}
    assert {process.member for process in bench.runtime.specs} <= known
    last = bench.journal.views[-1] if bench.journal.views else None
    for process, method, arguments in bench.runtime.calls:
        if method == "load" and arguments:
            taken = set(arguments[0].values())
            replicas = last.placement.held_by(process.member).items()
            assert not [e for e, slot in replicas if slot in taken and e not in arguments[0]]

    after = Bench(workers=3, slots=8, after=bench)
    after.ticks(30)
    assert after.controller.status().ready
    assert len(after.runtime.specs) == 6  # 3 workers, 2 ranks, 1 front door


def test_a_successor_knows_the_node_of_every_rank() -> None:
    bench = Bench(ranks=2)

    def opened(process: ProcessId) -> Opened:
        return Opened(pid=1, node=f"node-{process.rank}", store=f"h:{process.rank}")

    bench.runtime.answers |= {"open": opened, "start": opened}
    bench.ticks()
    after = Bench(ranks=2, after=bench)
    after.ticks()

    ranks = after.runtime.named("gateway-0")
    assert [after.runtime.nodes[process] for process in ranks] == ["node-0", "node-1"]
    assert after.view.members == bench.view.members


def test_fewer_workers_than_hold_the_experts_do_not_stay_alone() -> None:
    bench = Bench(workers=6, slots=4, floor=1)  # 12 experts
    bench.ticks()
    after = Bench(workers=2, slots=4, floor=1, after=bench)  # as by a changed configuration
    after.ticks(40)
    assert after.view.uncovered() == []
    assert list(after.workers().values()).count(MemberState.ACTIVE) == 3

    (victim,) = after.runtime.named(min(after.workers()))
    after.runtime.die(victim)
    after.ticks(60)
    assert after.view.uncovered() == []
    assert after.controller.status().ready


def test_who_waits_for_a_successor_does_so_under_the_next_controller() -> None:
    before = Bench(workers=2, slots=30, floor=2, settings="old")
    before.ticks()
    first = Bench(workers=2, slots=30, floor=2, settings="new", after=before)
    first.controller.rollout()
    first.controller.tick()
    (leaving,) = first.journal.latest().leaving
    assert first.journal.latest().relieved == {leaving}

    bench = Bench(workers=2, slots=30, floor=2, settings="new", after=first)
    numbers = []
    for _ in range(80):
        bench.ticks(1)
        numbers.append(sum(m.serves for m in bench.view.members if m.id.name.startswith("expert")))
    assert min(numbers) == 2
    assert leaving not in {member.id for member in bench.view.members}
