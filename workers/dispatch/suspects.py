"""Which rows of a layer expert workers may have ended by. Pure.

A worker that ends takes every call along that it had, so what was with it proves little: such rows
are *suspects* once they have met it often enough, and from then on each is sent in a message of its
own, which a worker computes by itself after saying so. A worker that ends then has shown which row
it was. A row is given up once that has been shown again by what was sent only after it had been
seen the first time: workers that end together, as those of one node, show it once. Then its layer
is at an end, since its step must be taken again without it: no other worker is put at risk.
"""

from collections.abc import Iterator

import numpy as np

from workers.dispatch.row_pairs import Pairs
from workers.placement import MemberId

MEETINGS = 2  # workers lost with a row until it is a suspect
PROOFS = 2  # one after the other: one worker may have ended by chance


class Suspects:
    """What is known against the rows of one layer; nothing, as long as no link is lost."""

    def __init__(self) -> None:
        self._met: dict[int, set[MemberId]] = {}
        self._shown_by: dict[int, set[MemberId]] = {}
        self._shown_until: dict[int, int] = {}  # newest message when a row was last shown
        self.given_up: set[int] = set()

    def __bool__(self) -> bool:
        """Whether any row has met a lost worker."""
        return bool(self._met)

    def lost(self, worker: MemberId, pairs: Pairs) -> None:
        """A worker was lost that had been sent these pairs."""
        for row in pairs.layer_rows():
            self._met.setdefault(row, set()).add(worker)

    def shown(self, worker: MemberId, pairs: Pairs, message_id: int, newest: int) -> None:
        """A worker was lost that computed these pairs and nothing else.

        Messages are numbered as they are made; `newest` is the last so far.
        """
        for row in pairs.layer_rows():
            if message_id <= self._shown_until.get(row, -1):
                continue
            self._shown_until[row] = newest
            shown_by = self._shown_by.setdefault(row, set())
            shown_by.add(worker)
            if len(shown_by) >= PROOFS:
                self.given_up.add(row)

    def apart(self, pairs: Pairs) -> Iterator[tuple[Pairs, bool]]:
        """Yield these pairs in the messages that they travel in, and whether each is alone."""
        rows = pairs.layer_rows()
        suspect_R = np.array([len(self._met.get(row, ())) >= MEETINGS for row in rows])
        if not suspect_R.any():
            yield pairs, False
            return
        if not suspect_R.all():
            yield pairs.only(np.where(suspect_R, 0, pairs.masks_R)), False
        for at in np.flatnonzero(suspect_R).tolist():
            yield pairs.one_row(at), True
