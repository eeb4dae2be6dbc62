"""Which slot holds which expert, read under leases and changed without disturbing anybody.

A computation takes a lease, resolves its experts under it, and returns it when its results are
out. A slot is overwritten in this order: unmap (new leases no longer see it), wait until every
lease that was taken before is back, write, verify, map. So nothing is ever written under a lease.
"""

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.clock import Clock
from workers.errors import CheckpointError, DeadlineError
from workers.placement import ExpertId

NO_SLOT = -1


class Lease(NamedTuple):
    """The map as it was when the lease was taken; the table is never changed in place.

    `slots_LF` holds the slot of expert e in column e, -1 where it is not here; the last column is
    that of no expert, so that id -1 finds it.
    """

    number: int
    slots_LF: NDArray[np.int64]


class SlotTable:
    """The map from expert to slot of one worker. Any thread may call anything.

    `changed` is what waits for leases to come back: a simulation brings its own.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        num_layers: int,
        num_experts: int,
        clock: Clock,
        changed: threading.Condition | None = None,
    ) -> None:
        self.num_slots = num_slots
        self._clock = clock
        self._changed = changed or threading.Condition(threading.Lock())
        self._slots_LF = np.full((num_layers, num_experts + 1), NO_SLOT, dtype=np.int64)
        self._expert_of: dict[int, ExpertId] = {}
        self._leases: set[int] = set()
        self._readers: dict[int, frozenset[int]] = {}  # leases that may still read an unmapped slot
        self._next_lease = 0
        self._num_waiting = 0  # for leases to come back

    def lease(self) -> Lease:
        """Take a lease, to be given back with `give_back` however the computation ends."""
        with self._changed:
            self._next_lease += 1
            self._leases.add(self._next_lease)
            return Lease(self._next_lease, self._slots_LF)

    def give_back(self, lease: Lease) -> None:
        """Give a lease back: nothing is read under it any more."""
        with self._changed:
            self._leases.remove(lease.number)
            if self._num_waiting:
                self._changed.notify_all()

    def held(self) -> Mapping[ExpertId, int]:
        """Return the slot of every expert that is mapped.

        One that was loaded a second time elsewhere is found there alone.
        """
        with self._changed:
            return {
                expert: slot
                for slot, expert in self._expert_of.items()
                if self._slots_LF[expert.layer, expert.expert] == slot
            }

    def overwrite(
        self,
        slot: int,
        expert: ExpertId,
        *,
        write: Callable[[], None],
        verify: Callable[[], bool],
        timeout_s: float,
    ) -> None:
        """Replace what is in a slot by another expert.

        Raises DeadlineError, with the slot left unmapped, when a lease is not back within
        `timeout_s`, and CheckpointError, likewise, when what was written does not verify.
        """
        assert 0 <= slot < self.num_slots, slot
        self.unmap(slot, timeout_s)
        write()
        if not verify():
            raise CheckpointError(f"{expert} in slot {slot} does not compute what it should")
        self._map(slot, expert)

    def unmap(self, slot: int, timeout_s: float) -> None:
        """Take an expert out of use and wait until nobody computes with its slot any more.

        Raises DeadlineError when a lease is not back within `timeout_s`.
        """
        deadline_s = self._clock.now_s() + timeout_s
        with self._changed:
            expert = self._expert_of.pop(slot, None)
            if expert is not None and self._slots_LF[expert.layer, expert.expert] == slot:
                self._change(expert, NO_SLOT)
            if expert is not None:
                self._readers[slot] = frozenset(self._leases)
            readers = self._readers.get(slot, frozenset())
            self._num_waiting += 1
            try:
                while readers & self._leases:
                    left_s = deadline_s - self._clock.now_s()
                    if left_s <= 0:
                        raise DeadlineError(f"slot {slot} is still being read")
                    self._changed.wait(left_s)
            finally:
                self._num_waiting -= 1

    def _map(self, slot: int, expert: ExpertId) -> None:
        with self._changed:
            self._expert_of[slot] = expert
            self._change(expert, slot)

    def _change(self, expert: ExpertId, slot: int) -> None:
        slots_LF = self._slots_LF.copy()
        slots_LF[expert.layer, expert.expert] = slot
        self._slots_LF = slots_LF
