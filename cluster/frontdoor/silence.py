"""For how long nothing was heard, by the listener's own count. Pure."""

_TICKS = 8


class Silence:
    """Counts ticks in which nothing was heard, not time.

    Whoever was held up itself, by a busy machine, counts one tick for that, and first hears what
    has come meanwhile: so it does not take its own pause for another's silence.
    """

    def __init__(self, limit_s: float) -> None:
        self.tick_s = limit_s / _TICKS
        self._num_ticks = 0

    @property
    def is_too_long(self) -> bool:
        """Whether it has reached the limit."""
        return self._num_ticks >= _TICKS

    def tick(self) -> None:
        """Count one more tick."""
        self._num_ticks += 1

    def broken(self) -> None:
        """Begin anew: something was heard."""
        self._num_ticks = 0
