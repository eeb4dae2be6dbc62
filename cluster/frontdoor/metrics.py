"""What the front door reports about itself while it serves."""

from typing import Protocol


class FrontDoorMetrics(Protocol):
    """Receives each observation once; calls come from the event loop and must not block."""

    def load_changed(self, in_flight: int, waiting: int) -> None:
        """Note the requests admitted and not ended, and those of them without a token yet."""
        ...

    def request_admitted(self, prompt_tokens: int) -> None:
        """Note a request that passed admission."""
        ...

    def first_token(self, seconds: float) -> None:
        """Note the time from a request's arrival to its first token."""
        ...

    def tokens(self, count: int, gap_s: float | None) -> None:
        """Note tokens of one sequence, and the time since its tokens before; None for its first."""
        ...

    def request_ended(self, method: str, code: str) -> None:
        """Note the end of a call by its gRPC status name, such as OK or CANCELLED."""
        ...


class NoMetrics:
    """Keeps nothing."""

    def load_changed(self, in_flight: int, waiting: int) -> None:
        """Keep nothing."""

    def request_admitted(self, prompt_tokens: int) -> None:
        """Keep nothing."""

    def first_token(self, seconds: float) -> None:
        """Keep nothing."""

    def tokens(self, count: int, gap_s: float | None) -> None:
        """Keep nothing."""

    def request_ended(self, method: str, code: str) -> None:
        """Keep nothing."""
