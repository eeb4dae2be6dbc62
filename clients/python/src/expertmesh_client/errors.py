"""What a call may raise.

ExpertmeshError                  any other failure; `code` is its gRPC status
├── InvalidRequestError          a mistake, with one entry per field (INVALID_ARGUMENT)
├── NotFoundError                no such model or request (NOT_FOUND)
├── DuplicateRequestError        the request id is in flight (ALREADY_EXISTS)
├── OverloadedError              the queue is full; try again later (RESOURCE_EXHAUSTED)
├── RefusedError                 it cannot be done here (FAILED_PRECONDITION)
├── UnauthenticatedError         the API key is missing or unknown (UNAUTHENTICATED)
├── PermissionDeniedError        the key may not do this (PERMISSION_DENIED)
├── UnavailableError             nobody could serve it, however often it was sent (UNAVAILABLE)
└── DeadlineError                the time that was given is over (DEADLINE_EXCEEDED)

Connections that break are no errors: the request is sent again, and the stream goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong, and what would be right."""

    field: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one attempt of a call ended, as the server or the transport says.

    `retry_after_s` is the server's word on when to try again; None where it says nothing.
    """

    code: grpc.StatusCode
    message: str
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None


class ExpertmeshError(Exception):
    """A call has failed, and sending it again would not help."""

    def __init__(self, message: str, failure: Failure, request_id: str) -> None:
        of_request = f" (request {request_id})" if request_id else ""
        super().__init__(f"{failure.code.name}: {message}{of_request}")
        self.code = failure.code
        self.request_id = request_id
        self.violations = failure.violations
        self.retry_after_s = failure.retry_after_s


class InvalidRequestError(ExpertmeshError, ValueError):
    """A request breaks one or more rules; `violations` names them."""


class NotFoundError(ExpertmeshError, ValueError):
    """The named model or request does not exist."""


class DuplicateRequestError(ExpertmeshError, ValueError):
    """A request with this id is in flight already."""


class OverloadedError(ExpertmeshError):
    """The queue is full; `retry_after_s` says when to try again."""


class RefusedError(ExpertmeshError, ValueError):
    """The server cannot do this as it stands."""


class UnauthenticatedError(ExpertmeshError):
    """The caller did not prove who it is: see `api_key` and `credentials`."""


class PermissionDeniedError(ExpertmeshError):
    """The caller is known, and may not do this."""


class UnavailableError(ExpertmeshError):
    """Nobody could serve it, however often it was sent."""


class DeadlineError(ExpertmeshError):
    """The time that the caller or the retry policy gave is over."""


_KINDS: Mapping[grpc.StatusCode, type[ExpertmeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.FAILED_PRECONDITION: RefusedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
}


def error_of(failure: Failure, request_id: str, note: str = "") -> ExpertmeshError:
    """Return the error that a failure is to the caller; the note says why it is not retried."""
    message = f"{failure.message}; {note}" if note else failure.message
    return _KINDS.get(failure.code, ExpertmeshError)(message, failure, request_id)
