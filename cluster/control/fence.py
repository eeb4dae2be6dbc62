"""The guard against controllers that have been superseded, in every process that they call."""

import threading

from workers.errors import RefusedError


class Fence:
    """Remembers the highest term that was heard, and refuses lower ones."""

    def __init__(self) -> None:
        self._term = 0
        self._lock = threading.Lock()

    def admit(self, term: int) -> None:
        """Let a call of this term pass; RefusedError when a higher term has been heard."""
        with self._lock:
            if term < self._term:
                raise RefusedError(f"term {term} is superseded by term {self._term}")
            self._term = term
