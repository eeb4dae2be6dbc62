"""The exception tree of both planes.

ExpertmeshError
├── InvalidRequestError      the caller's mistake, with one entry per field (INVALID_ARGUMENT)
├── NotFoundError            no such model, member or request (NOT_FOUND)
├── DuplicateRequestError    the request id is in flight (ALREADY_EXISTS)
├── OverloadedError          the queue is full; try again later (RESOURCE_EXHAUSTED)
├── DrainingError            this process takes no new work (UNAVAILABLE)
├── StaleAssignmentError     a newer assignment of the request is there (ABORTED)
├── IsolatedError            two suspects of gateway deaths do not run together (UNAVAILABLE)
├── UnavailableError         nothing that could serve it was there in time (UNAVAILABLE)
├── UnauthenticatedError     the caller did not prove who it is (UNAUTHENTICATED)
├── PermissionDeniedError    the caller is known and may not do this (PERMISSION_DENIED)
├── RefusedError             it would break a promise, such as coverage (FAILED_PRECONDITION)
├── ConfigError              a setting is unknown, mistyped or impossible
├── CheckpointError          a checkpoint is unsupported, incomplete or damaged
├── PlacementError           an expert has no usable replica
├── PoisonError              rows end the expert workers that compute them (INTERNAL)
├── SnapshotError            a snapshot is damaged, or not of this model or sequence
├── GatewayFailedError       the ranks of a gateway are gone or out of step; it must be replaced
└── DispatchError            a message or link failed
    ├── LinkClosedError      the link is closed or broke
    └── DeadlineError        a wait ended by its deadline

The gRPC status of each is assigned in `cluster/frontdoor/translate.py`; whatever is not listed with
one is INTERNAL.
"""

from dataclasses import dataclass


class ExpertmeshError(Exception):
    """Base of every error that this project raises on purpose."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong, and what would be right."""

    field: str
    description: str


class InvalidRequestError(ExpertmeshError, ValueError):
    """A request breaks one or more rules; nothing was computed for it."""

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class NotFoundError(ExpertmeshError, ValueError):
    """The named model, member or request does not exist."""


class DuplicateRequestError(ExpertmeshError, ValueError):
    """A request with this id is in flight already."""


class OverloadedError(ExpertmeshError):
    """The queue is full; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrainingError(ExpertmeshError):
    """This process finishes what it has and takes no new work."""


class StaleAssignmentError(ExpertmeshError):
    """A newer assignment of the request is at the gateway: `held` is its number."""

    def __init__(self, message: str, held: int) -> None:
        super().__init__(message)
        self.held = held


class IsolatedError(ExpertmeshError):
    """Another request that was present at gateway deaths runs there; no two of them do at once."""


class UnavailableError(ExpertmeshError):
    """Nothing that could serve the request was there in time; sending it again is safe."""


class UnauthenticatedError(ExpertmeshError):
    """The caller did not prove who it is."""


class PermissionDeniedError(ExpertmeshError):
    """The caller is known, and may not do this."""


class RefusedError(ExpertmeshError, ValueError):
    """The operation would break a promise of the cluster, such as the coverage of its experts."""


class ConfigError(ExpertmeshError, ValueError):
    """A setting is unknown, mistyped or impossible; the message lists all, with their paths."""


class CheckpointError(ExpertmeshError, ValueError):
    """A checkpoint is unsupported, incomplete or damaged; the message names tensor and file."""


class TraceError(ExpertmeshError, ValueError):
    """A recorded trace is damaged, of another version, or would be empty."""


class PlacementError(ExpertmeshError):
    """An expert has no usable replica."""


class PoisonError(ExpertmeshError):
    """Rows of a step end the expert workers that compute them; `segments` are theirs.

    All ranks of a gateway raise it alike.
    """

    def __init__(self, segments: tuple[int, ...]) -> None:
        super().__init__(
            "expert workers ended, one after another, by computing it and nothing else"
        )
        self.segments = segments


class SnapshotError(ExpertmeshError):
    """A snapshot is damaged, or not of this model or sequence: compute from the prompt instead."""


class GatewayFailedError(ExpertmeshError):
    """A rank of this gateway is gone or out of step: the gateway must be replaced as a whole."""


class DispatchError(ExpertmeshError):
    """A message between a gateway rank and an expert worker failed."""


class LinkClosedError(DispatchError):
    """The link is closed or broke; nothing more will arrive on it."""


class DeadlineError(DispatchError):
    """A wait ended by its deadline."""
