"""A gateway of two ranks in virtual time: I6, a step's states are seen whole or not at all.

The production's `Leader` and `Follower` run over a simulated broadcast. Forwards raise, on one rank
or on both, before or after they have staged; a rank may die at any moment, which ends the gateway.
"""

from collections import deque
from typing import Any

from tests.chaos.lab.members import ViolationError
from tests.chaos.lab.simulator import Simulator, Wait
from workers.errors import GatewayFailedError
from workers.gateway.lockstep import Follower, Leader
from workers.model.batch import Segment, StepBatch

NUM_STEPS = 12
VOTE_S = 1.0


class Dead(Exception):  # noqa: N818 - not an error of the product
    """The rank's process has ended."""


class States:
    """What a rank has committed: the numbers of the steps, each whole."""

    def __init__(self) -> None:
        self.committed: list[int] = []
        self.staged: int | None = None

    def commit(self) -> None:
        if self.staged is not None:
            self.committed.append(self.staged)
        self.staged = None

    def discard(self) -> None:
        self.staged = None


class SimRanks:
    """Two ranks, their group, their votes."""

    size = 2

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.states = [States(), States()]
        self.votes: dict[tuple[int, int], bool] = {}
        self.is_alive = [True, True]
        self.failed = [False, False]
        self.decided: list[int] = []  # steps that the leader committed, by number
        self._messages: deque[bytes] = deque()
        self._wait: Wait | None = None
        self._step = 0
        draw = simulator.draw
        self._raises = {
            step: draw.choice(("none",) * 5 + ("both", "one before", "one after"))
            for step in range(NUM_STEPS)
        }
        self._tries: set[int] = set()

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """As a group's: rank 0 brings bytes, rank 1 waits for them; RuntimeError by death."""
        if payload is not None:
            self._check(0)
            self._messages.append(payload)
            if self._wait is not None:
                self._wait.end()
            return payload
        while not self._messages:
            self._check(1)
            self._wait = Wait(self.simulator, VOTE_S)
            self._wait.park()
            self._wait = None
        self.simulator.sleep(self.simulator.draw.uniform(0.0, 0.01))
        self._check(1)
        return self._messages.popleft()

    def _check(self, rank: int) -> None:
        if not self.is_alive[rank]:
            raise Dead
        if not self.is_alive[1 - rank] or self.failed[1 - rank]:
            raise RuntimeError("the other rank is gone")

    def forward(self, rank: int, batch: StepBatch) -> Any:
        """Stage the step that a batch names, or raise as drawn."""
        step = batch.segments[0].start
        self.simulator.sleep(self.simulator.draw.uniform(0.0, 0.01))
        if not self.is_alive[rank]:
            raise Dead
        how = self._raises[step] if step not in self._tries or rank == 1 else "none"
        if how == "both" or (how == "one before" and rank == 1):
            raise ValueError(f"step {step} fails")
        self.states[rank].staged = step
        if how == "one after" and rank == 1:
            raise ValueError(f"step {step} fails late")
        return step

    def is_unanimous(self, rank: int, number: int) -> bool:
        """As a `StoreVote`: whether both ranks report the failure in time."""
        self.votes[rank, number] = True
        self.simulator.sleep(VOTE_S)
        return all(self.votes.get((r, number), False) for r in range(2)) and all(self.is_alive)


class _Vote:
    def __init__(self, ranks: SimRanks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank

    def is_unanimous(self, number: int) -> bool:
        return self._ranks.is_unanimous(self._rank, number)


def run_ranks(seed: int) -> str:
    """Run one seed; returns the violation, or nothing."""
    simulator = Simulator(seed)
    ranks = SimRanks(simulator)
    ended = [False, False]
    leader = Leader(ranks, lambda b: ranks.forward(0, b), ranks.states[0], _Vote(ranks, 0))
    follower = Follower(ranks, lambda b: ranks.forward(1, b), ranks.states[1], _Vote(ranks, 1))

    def lead() -> None:
        step = 0
        try:
            while step < NUM_STEPS:
                try:
                    leader.compute(_batch(step))
                except ValueError:
                    ranks._tries.add(step)
                    ranks._raises[step] = "none"
                    continue  # it failed everywhere: the same step again
                if simulator.draw.random() < 0.1:
                    leader.discard()  # what the leader does next failed: nothing of it counts
                    continue
                leader.commit()
                ranks.decided.append(step)
                step += 1
            leader.stop()
        except GatewayFailedError:
            ranks.failed[0] = True
        except Dead:
            pass
        ended[0] = True

    def follow() -> None:
        try:
            while follower.follow():
                _compare(ranks)
            _compare(ranks)
        except GatewayFailedError:
            ranks.failed[1] = True
        except Dead:
            pass
        ended[1] = True

    simulator.start(lead)
    simulator.start(follow)
    if simulator.draw.random() < 0.3:
        rank, at_s = simulator.draw.randrange(2), simulator.draw.uniform(0.0, 0.3)
        simulator.after(at_s, lambda: ranks.is_alive.__setitem__(rank, False))
    try:
        if not simulator.run(200.0, lambda: all(ended)):
            return f"I9: a rank waits for ever: {ended}"
        for states in ranks.states:
            if states.committed != sorted(set(states.committed)):
                return f"I6: a step counts twice: {states.committed}"
        if not any(ranks.failed) and all(ranks.is_alive):
            first, second = (s.committed for s in ranks.states)
            if first != second or first != ranks.decided:
                return f"I6: ranks end with {first} and {second} where {ranks.decided} was decided"
    except ViolationError as violation:
        return str(violation)
    return ""


def _compare(ranks: SimRanks) -> None:
    """Rank 1 may lag behind rank 0's decisions, but never hold what was not decided."""
    first, second = (states.committed for states in ranks.states)
    if second != first[: len(second)]:
        raise ViolationError(f"I6: rank 1 has committed {second}, rank 0 {first}")


def _batch(step: int) -> StepBatch:
    segment = Segment(token_ids=(1,), start=step, state_block=0, kv_blocks=(0,), num_logits=1)
    return StepBatch(segments=(segment,))
