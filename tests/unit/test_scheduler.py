import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.harness_gateway import make_request
from workers.errors import InvalidRequestError
from workers.gateway.scheduler import Scheduler, SchedulerOptions
from workers.gateway.sequence import Phase, Sequence
from workers.types import FinishReason


def make_scheduler(**options):
    defaults = {"step_tokens": 16, "max_sequences": 4, "block_tokens": 4, "num_kv_blocks": 64}
    return Scheduler(SchedulerOptions(**{**defaults, **options}))


class Client:
    """Adds sequences and commits what is scheduled, as an engine does."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.order = 0

    def add(self, prompt_tokens, max_tokens=4, emitted=()):
        request = make_request(
            f"r{self.order}", tuple([1] * prompt_tokens), max_tokens=max_tokens, emitted=emitted
        )
        sequence = Sequence(request, 0, self.order)
        self.order += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        work = self.scheduler.schedule()
        for w in work:
            token = 1 if w.sequence.samples(w.segment) else None
            reason = w.sequence.commit(w.segment, [], token)
            if reason is not None:
                self.scheduler.finish(w.sequence, reason)
        return [(w.sequence, w.segment) for w in work]


def sizes(work):
    return [(sequence.order, len(segment.token_ids)) for sequence, segment in work]


def test_a_long_prompt_is_cut_to_the_budget_and_never_stalls_decoding():
    client = Client(make_scheduler(step_tokens=10, num_kv_blocks=100))
    client.add(3, max_tokens=50)
    assert sizes(client.step()) == [(0, 3)]
    client.add(25)

    assert [sizes(client.step()) for _ in range(4)] == [
        [(0, 1), (1, 9)],
        [(0, 1), (1, 9)],
        [(0, 1), (1, 7)],
        [(0, 1), (1, 1)],
    ]


def test_several_prompts_share_a_step_oldest_first():
    client = Client(make_scheduler(step_tokens=10))
    for _ in range(3):
        client.add(4)

    assert sizes(client.step()) == [(0, 4), (1, 4), (2, 2)]
    assert sizes(client.step()) == [(0, 1), (1, 1), (2, 2)]


def test_no_more_run_than_there_are_state_blocks():
    client = Client(make_scheduler(max_sequences=2))
    for _ in range(3):
        client.add(2, max_tokens=1)

    assert sizes(client.step()) == [(0, 2), (1, 2)]
    assert sizes(client.step()) == [(2, 2)]
    assert client.scheduler.states.num_used == client.scheduler.kv.num_used == 0


def test_the_newest_is_preempted_when_blocks_run_out_and_recomputed_first():
    client = Client(make_scheduler(num_kv_blocks=6, block_tokens=4))
    old, new = client.add(8, max_tokens=9), client.add(7, max_tokens=9)
    client.step()
    assert client.scheduler.kv.num_free == 2
    late = client.add(1)
    while not client.scheduler.num_preemptions:
        client.step()

    assert new.phase is Phase.WAITING
    assert (new.computed, new.kv_blocks) == (0, [])
    assert late.phase is Phase.WAITING
    while old.phase is Phase.DECODING:
        client.step()
    assert next(sequence for sequence, _ in client.step()) is new


def test_a_sequence_stalls_rather_than_preempt_an_older_one():
    client = Client(make_scheduler(num_kv_blocks=4, block_tokens=4))
    old, new = client.add(4, max_tokens=9), client.add(3, max_tokens=9)
    client.step()
    for sequence in (old, new):
        assert sequence.phase is Phase.DECODING
    client.step()
    assert client.scheduler.kv.num_free == 1
    held = client.scheduler.kv.take(1)

    assert sizes(client.step()) == [(0, 1)]
    assert new.phase is Phase.DECODING
    client.scheduler.kv.give_back(held)
    assert sizes(client.step()) == [(0, 1), (1, 1)]


def test_resumed_sequences_queue_ahead_of_those_never_admitted():
    client = Client(make_scheduler(max_sequences=1))
    client.add(2, max_tokens=2)
    client.add(2)
    resumed = client.add(2, emitted=((1,),))
    client.step()
    client.step()

    assert client.step()[0][0] is resumed


def test_a_request_that_can_never_fit_is_refused():
    scheduler = make_scheduler(num_kv_blocks=4, block_tokens=4)
    scheduler.check_fits(make_request(prompt=(1,) * 10, max_tokens=7))

    with pytest.raises(InvalidRequestError, match="holds 16"):
        scheduler.check_fits(make_request(prompt=(1,) * 10, max_tokens=8))


def test_nobody_overtakes_a_big_request_that_waits_for_room():
    client = Client(make_scheduler(num_kv_blocks=8, block_tokens=4))
    client.add(12, max_tokens=3)
    client.step()
    big = client.add(24, max_tokens=3)
    small = client.add(1, max_tokens=3)

    assert sizes(client.step()) == [(0, 1)]
    client.step()
    assert big.phase is Phase.WAITING
    assert client.step()[0][0] is big
    assert small.phase is Phase.WAITING


def test_bit_stable_segments_do_not_depend_on_company():
    def segments_of(company):
        options = {"step_tokens": 300, "num_kv_blocks": 500, "bit_stable": True}
        client = Client(make_scheduler(**options))
        for _ in range(company):
            client.add(70, max_tokens=20)
        watched = client.add(140, max_tokens=6, emitted=((1, 1),))
        cuts = []
        while watched.finish is None:
            cuts += [
                (segment.start, len(segment.token_ids))
                for sequence, segment in client.step()
                if sequence is watched
            ]
        return cuts

    alone = segments_of(0)
    assert alone == [(0, 64), (64, 64), (128, 12), (140, 1), (141, 1), (142, 1), (143, 1), (144, 1)]
    assert segments_of(3) == alone


def test_scheduling_needs_no_torch():
    program = "import sys, workers.gateway.scheduler; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


events = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 12), st.integers(0, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 4)),
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    st.lists(events, max_size=40), st.integers(4, 12), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_all_finish_and_every_block_comes_back(steps, num_kv_blocks, max_sequences, bit_stable):
    scheduler = make_scheduler(
        num_kv_blocks=num_kv_blocks, max_sequences=max_sequences,
        step_tokens=max_sequences + 63 if bit_stable else max_sequences, bit_stable=bit_stable,
    )  # fmt: skip
    client = Client(scheduler)

    def check():
        running = [s for s in scheduler.sequences() if s.state_block is not None]
        assert scheduler.states.num_used == len(running) == scheduler.num_running
        assert scheduler.kv.num_used == sum(len(s.kv_blocks) for s in running)
        assert len(running) <= max_sequences

    for kind, *arguments in steps:
        if kind == "add":
            prompt, max_tokens, emitted = arguments
            if prompt + max_tokens <= num_kv_blocks * 4:
                emitted = min(emitted, max_tokens - 1)
                client.add(prompt, max_tokens, ((1,) * emitted,) if emitted else ())
        elif kind == "cancel":
            alive = list(scheduler.sequences())
            if alive:
                scheduler.finish(alive[arguments[0] % len(alive)], FinishReason.CANCELLED)
        else:
            for _ in range(arguments[0]):
                client.step()
                check()
    for _ in range(3000):
        if not list(scheduler.sequences()):
            break
        assert client.step()  # something advances in every step
        check()
    assert scheduler.kv.num_used == scheduler.states.num_used == 0
    assert scheduler.num_waiting == scheduler.num_running == 0
