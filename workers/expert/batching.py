"""Which pairs of which calls are computed together: pure.

Everything that waits is taken at once, calls of one layer together, whatever gateway they are
from, and their pairs are grouped by expert. But a call that other workers may have ended by is
taken by itself, when nothing else waits or after it was passed over a few times, and nothing after
it before the reply has come: what is on its way is lost with a worker that ends, and would look as
if it had been the cause.

Shape legend: R rows of all calls of a layer, K experts a row, P pairs, F experts and a last column
for none.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from workers.dispatch.plan import BIT_K
from workers.errors import DispatchError


class Batched(Protocol):
    """A call that may be computed together with others of the same batch key."""

    @property
    def batch_key(self) -> tuple[int, int]:
        """Layer index, and flags that change what is computed."""
        ...

    @property
    def arrived_s(self) -> float:
        """When it came."""
        ...

    @property
    def is_alone(self) -> bool:
        """Whether it must be computed by itself."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether its reply is known to have come, or to be of no use."""
        ...


SETTLE_S = 1.0  # how long the next suspect waits for a gateway that may be frozen
OTHERS_SETTLE_S = 0.1  # and all others
PASSES = 4  # how often others are taken before one that must be alone

CallT = TypeVar("CallT", bound=Batched)


class CallQueue(Generic[CallT]):
    """The calls that wait; any thread puts, one at a time takes."""

    def __init__(self) -> None:
        self._together: deque[CallT] = deque()
        self._alone: deque[CallT] = deque()
        self._begun: CallT | None = None  # the last one that was taken by itself
        self._begun_s = 0.0
        self._num_passes = 0

    def __len__(self) -> int:
        return len(self._together) + len(self._alone)

    def put(self, call: CallT) -> None:
        """Add a call."""
        (self._alone if call.is_alone else self._together).append(call)

    def oldest(self) -> CallT | None:
        """Return the call that has waited longest; None when none waits."""
        firsts = [*islice(self._alone.copy(), 1), *islice(self._together.copy(), 1)]
        return min(firsts, key=lambda call: call.arrived_s, default=None)

    def has_next(self, now_s: float) -> bool:
        """Whether `take` would bring anything; without it, a while later or after news."""
        if self._together and self._may_go_on(now_s):
            return True
        return bool(self._alone) and self._may_begin(now_s)

    def take(self, now_s: float) -> list[CallT]:
        """Take what is to be computed next: all that go together, or one by itself."""
        while self._alone and self._alone[0].is_settled:  # its gateway is gone
            self._alone.popleft()
        if self._alone and self._may_begin(now_s):
            if not self._together or self._num_passes >= PASSES:
                self._num_passes = 0
                self._begun, self._begun_s = self._alone.popleft(), now_s
                return [self._begun]
            self._num_passes += 1
        calls: list[CallT] = []
        while self._together and self._may_go_on(now_s):
            calls.append(self._together.popleft())
        return calls

    def _may_begin(self, now_s: float) -> bool:
        """Whether a suspect may be computed, as far as the one before is concerned."""
        return self._is_over(now_s - SETTLE_S)

    def _may_go_on(self, now_s: float) -> bool:
        """Whether others may be: a worker that ends by them must not seem to have by a suspect."""
        return self._is_over(now_s - OTHERS_SETTLE_S)

    def _is_over(self, begun_by_s: float) -> bool:
        return self._begun is None or self._begun.is_settled or self._begun_s <= begun_by_s


@dataclass(slots=True, eq=False)
class PairGroups:
    """Pairs sorted by slot, and by row within one; `pairs_P` counts row * K + k."""

    pairs_P: NDArray[np.int64]
    rows_P: NDArray[np.int64]
    slots: list[int]
    offsets: list[int]


def into_batches(calls: Sequence[CallT]) -> list[list[CallT]]:
    """Group calls by batch key; batches in the order in which their first call came."""
    batches: dict[tuple[int, int], list[CallT]] = {}
    for call in calls:
        batches.setdefault(call.batch_key, []).append(call)
    return list(batches.values())


def group_by_expert(ids_RK: NDArray[np.int32], slot_F: NDArray[np.int64]) -> PairGroups:
    """Sort the pairs whose experts are here by slot.

    Args:
        ids_RK: Expert ids, -1 for none.
        slot_F: A layer's row of `Lease.slots_LF`.

    Raises DispatchError when an id is beyond the experts of the model.
    """
    try:
        slot_P = slot_F.take(ids_RK.ravel())
    except IndexError as error:
        raise DispatchError(f"expert {ids_RK.max()} of {len(slot_F) - 1}") from error
    pairs_P = slot_P.argsort(kind="stable")
    slot_P = slot_P[pairs_P]
    first_here = int(slot_P.searchsorted(0))
    if first_here:
        pairs_P, slot_P = pairs_P[first_here:], slot_P[first_here:]
    ends = (slot_P[1:] != slot_P[:-1]).nonzero()[0]
    return PairGroups(
        pairs_P=pairs_P,
        rows_P=pairs_P // ids_RK.shape[1],
        slots=slot_P.take(ends).tolist() + slot_P[-1:].tolist(),
        offsets=[0] * (len(slot_P) > 0) + [end + 1 for end in ends.tolist()] + [len(slot_P)],
    )


def masks_of(groups: PairGroups, num_rows: int, top_k: int) -> NDArray[np.uint32]:
    """Return, per row, the mask of the experts that are among the pairs."""
    named_RK = np.zeros((num_rows, top_k), dtype=bool)
    named_RK.reshape(-1)[groups.pairs_P] = True
    masks_R: NDArray[np.uint32] = named_RK.dot(BIT_K[:top_k])
    return masks_R
