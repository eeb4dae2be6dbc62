"""Dispatch with recovery switched off: what is left when nothing can fail. For measuring only.

Calls are not attempts that others may stand in for: a reply counts because it came. Nothing has a
deadline, headers carry no checksum, and workers read their slots without a lease.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from workers.dispatch import exchange, header
from workers.dispatch.exchange import LinkDispatcher
from workers.dispatch.recovery import AnswerTimes, Attempt, Group
from workers.dispatch.row_pairs import Pairs
from workers.dispatch.suspects import Suspects
from workers.expert.slots import Lease, SlotTable

NEVER_S = float("inf")


class PlainCall:
    """Stands in for a `LayerCall`."""

    disturbed = False

    def __init__(self, layer: int, pairs: Pairs) -> None:
        self.layer = layer
        self.outstanding: dict[int, Attempt] = {}
        self.accepted: list[Attempt] = []
        self.complete = False
        self.suspects = Suspects()
        self._groups = [Group(waiting=pairs)]
        self._sent: Sequence[Attempt] = ()

    def needs(self) -> list[Group]:
        groups, self._groups = self._groups, []
        return groups

    def place(self, group: Group, attempts: Sequence[Attempt], rest: Pairs | None) -> None:
        assert rest is None, "every expert has a worker here"
        self._sent = attempts
        for attempt in attempts:
            self.outstanding[attempt.message_id] = attempt
        self.complete = not attempts

    def reply(
        self, message_id: int, worker: Any, incarnation: int, summed_R: Any, payload: object
    ) -> Attempt:
        attempt = self.outstanding.pop(message_id)
        attempt.payload = payload
        self.accepted.append(attempt)
        self.complete = not self.outstanding
        return attempt

    def next_deadline_s(self) -> float:
        return NEVER_S

    def overdue(self, now_s: float) -> list[Attempt]:
        return []

    def cover(self) -> Iterator[Attempt]:
        yield from self._sent


class _Zero:
    """Stands in for the module zlib."""

    @staticmethod
    def crc32(_raw: object) -> int:
        return 0


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def plain_gateway() -> Iterator[None]:
    """Switch recovery off in this process, at the gateway's end of the links."""
    with (
        _replaced(exchange, "LayerCall", PlainCall),
        _replaced(AnswerTimes, "record", lambda *_: None),
        _replaced(AnswerTimes, "deadline_s", lambda *_: NEVER_S),
        _replaced(LinkDispatcher, "_is_current", lambda *_: True),
        _replaced(header, "zlib", _Zero()),
    ):
        yield


@contextlib.contextmanager
def plain_worker() -> Iterator[None]:
    """Switch recovery off in this process, at a worker's end of the links."""

    def lease(self: SlotTable) -> Lease:
        return Lease(0, self._slots_LF)

    with (
        _replaced(SlotTable, "lease", lease),
        _replaced(SlotTable, "give_back", lambda *_: None),
        _replaced(header, "zlib", _Zero()),
    ):
        yield
