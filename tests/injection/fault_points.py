"""Has a rank of a gateway kill itself at a named point, each time that a test arms one.

A `Trap` is the test's side. It writes into the directory FAULT_POINTS which process is to die at
which point; that process takes the file away, leaves word of what it was at, and sends itself
SIGKILL, so nothing of it is cleaned up. Where no file is, a point costs one look for it.

`before-commit`: rank 0 has the logits and the tokens of a step, and has committed neither. Other
ranks have done their forward, and hear of no outcome.
`after-commit`: rank 0 has committed states and tokens, no client's sink has the events. Other ranks
have committed their states.
`mid-snapshot`: of a rank's part of a snapshot the head and the keys and values are sent, the states
are not. With several ranks another one's part has been sent as a whole by then.
`parked`: rows of this rank wait for an expert of which no copy is in reach, and rows have done so
for `PARKED_S` without a break.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tests.injection.into import environment_of

BEFORE_COMMIT = "before-commit"
AFTER_COMMIT = "after-commit"
MID_SNAPSHOT = "mid-snapshot"
PARKED = "parked"
PARKED_S = 0.05
POINTS = (BEFORE_COMMIT, AFTER_COMMIT, MID_SNAPSHOT, PARKED)

_ARMED = "armed.json"
_MET = "met.json"
_SIBLING_S = 1.0  # for another rank's part; the holder waits for longer than that
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Met:
    """The word of a process that has killed itself.

    `found` is what there was: `num_events` of the step; `start` and `position` of the snapshot, and
    how many ranks had sent their parts; for how long rows had been `waiting_s`.
    """

    point: str
    rank: int
    pid: int
    found: dict[str, float]


class Trap:
    """Arms points, one process at a time.

    Args:
        directory: Where the processes look; `environment` has them do so.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which processes have the points."""
        return environment_of(
            ",".join(_CHANGES),
            "tests.injection.fault_points:change",
            FAULT_POINTS=str(self._directory),
        )

    @contextlib.contextmanager
    def armed(self, point: str, pid: int, *, least_start: int = 0) -> Iterator[None]:
        """Have a process die at its next time at a point; when this ends it is safe again.

        At `mid-snapshot` only with a part that begins there or behind: 1 leaves out whole ones.
        """
        for left in self._directory.iterdir():
            left.unlink(missing_ok=True)
        _write(self._directory / _ARMED, {"point": point, "pid": pid, "least_start": least_start})
        try:
            yield
        finally:
            (self._directory / _ARMED).unlink(missing_ok=True)

    def met(self) -> Met | None:
        """Return what the process has left behind; None while it lives."""
        try:
            return Met(**json.loads((self._directory / _MET).read_text()))
        except FileNotFoundError:
            return None


def change(module: Any) -> None:
    """Change one of the modules that have points."""
    _CHANGES[module.__name__](module)


def _change_lockstep(module: Any) -> None:
    leader, follower = module.Leader, module.Follower
    commit, compute, begin = leader.commit, follower._compute, follower.__init__

    def committing(self: Any) -> None:
        _die_at(BEFORE_COMMIT, self._group.rank)
        commit(self)

    def computing(self: Any, message: Any) -> None:
        compute(self, message)
        _die_at(BEFORE_COMMIT, self._group.rank)

    def beginning(self: Any, group: Any, forward: Any, cache: Any, *more: Any) -> None:
        begin(self, group, forward, cache, *more)
        commit_states = cache.commit

        def committing_states() -> None:
            commit_states()
            _die_at(AFTER_COMMIT, group.rank)

        cache.commit = committing_states

    leader.commit, follower._compute, follower.__init__ = committing, computing, beginning


def _change_clients(module: Any) -> None:
    deliver = module.Clients.deliver

    def delivering(self: Any, events: Any) -> Any:
        if any(event.token_ids for event in events):
            _die_at(AFTER_COMMIT, 0, num_events=len(events))  # the only rank with clients
        return deliver(self, events)

    module.Clients.deliver = delivering


def _change_snapshot_lines(module: Any) -> None:
    write = module.Line.write

    def writing(self: Any, message: Any, *payloads: bytes) -> None:
        order = _order(MID_SNAPSHOT) if payloads else None
        if order is None:
            write(self, message, *payloads)
            return
        head = message.part.head
        if order["pid"] != os.getpid() or head.start < order.get("least_start", 0):
            write(self, message, *payloads)
            _mark_of(head).touch()
            return
        keys_and_values, states = payloads
        write(self, message, keys_and_values)
        if head.size == 1 or _comes(_mark_of(head)):
            position, sent = head.position, head.size - 1
            _die_at(MID_SNAPSHOT, head.rank, start=head.start, position=position, parts_sent=sent)
        with self._writing:  # the other rank sent its part before the point was armed
            self._connection.sendall(states)

    module.Line.write = writing


def _change_exchange(module: Any) -> None:
    listen = module.LinkDispatcher._listen

    def listening(self: Any, state: Any) -> None:
        before_s = self._parked_s
        listen(self, state)
        waited_s = self._parked_s - before_s
        spell_s = self._spell_s = waited_s and getattr(self, "_spell_s", 0.0) + waited_s
        if spell_s >= PARKED_S and any(call.state.needs() for call in self._outbox.calls):
            _die_at(PARKED, self._links._rank, waiting_s=round(spell_s, 3))

    module.LinkDispatcher._listen = listening


_CHANGES = {
    "workers.gateway.lockstep": _change_lockstep,
    "workers.gateway.clients": _change_clients,
    "cluster.snapshot_lines": _change_snapshot_lines,
    "workers.dispatch.exchange": _change_exchange,
}


def _directory() -> Path:
    return Path(os.environ["FAULT_POINTS"])


def _order(point: str) -> dict[str, Any] | None:
    """Return what is armed, if it is this point."""
    path = _directory() / _ARMED
    if not path.exists():
        return None
    try:
        order: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:  # just now taken
        return None
    return order if order["point"] == point else None


def _die_at(point: str, rank: int, **found: float) -> None:
    """End here and now, if it is this process that is to die at this point."""
    order = _order(point)
    if order is None or order["pid"] != os.getpid():
        return
    try:
        (_directory() / _ARMED).rename(_directory() / "taken.json")
    except FileNotFoundError:  # another thread has, or it is armed no more
        return
    met = {"point": point, "rank": rank, "pid": os.getpid(), "found": found}
    _write(_directory() / _MET, met)
    os.kill(os.getpid(), signal.SIGKILL)


def _mark_of(head: Any) -> Path:
    """Return the file that says that another rank's part of a snapshot has been sent."""
    stamp = (head.owner, head.request_id, head.sequence_index, head.assignment, head.position)
    return _directory() / f"{blake2b(repr(stamp).encode(), digest_size=16).hexdigest()}.sent"


def _comes(path: Path) -> bool:
    """Whether a file is there in time."""
    end_s = time.monotonic() + _SIBLING_S
    while not path.exists():
        if time.monotonic() > end_s:
            return False
        time.sleep(_POLL_S)
    return True


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there as a whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content))
    draft.rename(path)
