"""The client of an Expertmesh cluster: requests that survive broken connections.

Client and AsyncClient speak to the front doors; see `expertmesh_client.types` for what goes in and
comes out, and `expertmesh_client.errors` for what may be raised.
"""

from expertmesh_client.aio import AsyncClient, AsyncStream
from expertmesh_client.channel import tls_credentials
from expertmesh_client.client import Client, Stream
from expertmesh_client.errors import (
    DeadlineError,
    DuplicateRequestError,
    ExpertmeshError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RefusedError,
    UnauthenticatedError,
    UnavailableError,
)
from expertmesh_client.retry import RetryPolicy
from expertmesh_client.types import (
    Answer,
    Completion,
    Finish,
    FinishReason,
    Message,
    Model,
    Output,
    Sampling,
    Stopping,
    TokenLogprob,
    Tool,
    ToolCall,
    Update,
    Usage,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "DeadlineError",
    "DuplicateRequestError",
    "ExpertmeshError",
    "FieldViolation",
    "Finish",
    "FinishReason",
    "InvalidRequestError",
    "Message",
    "Model",
    "NotFoundError",
    "Output",
    "OverloadedError",
    "PermissionDeniedError",
    "RefusedError",
    "RetryPolicy",
    "Sampling",
    "Stopping",
    "Stream",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "UnauthenticatedError",
    "UnavailableError",
    "Update",
    "Usage",
    "tls_credentials",
]
