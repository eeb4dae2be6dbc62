"""One request on its way to its last token, over as many attempts as that takes.

Pure: messages, failures and the time go in; requests, updates and waits come out. The clients do
the talking.
"""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import grpc

from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as pb
from expertmesh_client.errors import Failure
from expertmesh_client.retry import Retries
from expertmesh_client.translate import Response, failure_of, update_of
from expertmesh_client.types import Finish, FinishReason, Update, Usage

AnyRequest = TypeVar("AnyRequest", pb.GenerateRequest, pb.ChatRequest)


class BrokenStreamError(Exception):
    """A stream is not what was asked for; its request is sent again."""


@dataclass(frozen=True, slots=True)
class Attempt(Generic[AnyRequest]):
    """What is to be sent, to which target, and how long it may take."""

    request: AnyRequest
    target: int
    timeout_s: float


class Journey(Generic[AnyRequest]):
    """Keeps what the caller has of each sequence, and asks for the rest.

    Args:
        request: The whole request, with the id under which it is sent every time.
        retries: Decides about other attempts.
    """

    def __init__(self, request: AnyRequest, retries: Retries) -> None:
        sampling = request.sampling
        num_sequences = sampling.num_sequences if sampling.HasField("num_sequences") else 1
        self.request_id = request.request_id
        self.seed = sampling.seed if sampling.HasField("seed") else None
        self._request: AnyRequest = request
        self._retries = retries
        self._token_ids: list[list[int]] = [[] for _ in range(max(1, num_sequences))]
        self._finishes: dict[int, Finish] = {}
        self._is_cancelled = False
        self._is_admitted = False  # a stream has begun, or the server says that one is open

    @property
    def is_complete(self) -> bool:
        """Whether every sequence has ended."""
        return len(self._finishes) == len(self._token_ids)

    def begin(self, now_s: float) -> Attempt[AnyRequest]:
        """Return the next attempt: the whole request, and what there is of its answer."""
        request = type(self._request)()
        request.CopyFrom(self._request)
        if self.seed is not None:
            request.sampling.seed = self.seed
        for index, token_ids in enumerate(self._token_ids):
            if token_ids:
                request.resume_from.add(sequence_index=index, token_ids=token_ids)
        if self._is_admitted and not request.resume_from:
            # No full queue refuses it now, and a stream that was lost gives way to this one.
            request.resume_from.add(sequence_index=0)
        return Attempt(request, self._retries.target, self._retries.begin(now_s))

    def take(self, response: Response, now_s: float) -> Update | None:
        """Return what a message adds; None when the caller has it already.

        Raises:
            BrokenStreamError: Its tokens do not follow on those before.
        """
        self._is_admitted = True
        if response.HasField("seed"):
            self._take_seed(response.seed)
        update = update_of(response)
        index = update.sequence_index
        if index >= len(self._token_ids):
            raise BrokenStreamError(f"the stream has a sequence {index} that was not asked for")
        if index in self._finishes:  # a resumed stream ends it again
            return None
        token_ids = self._token_ids[index]
        if update == Update(sequence_index=index, first_token_index=update.first_token_index):
            return None  # the first message, which has the request id and the seed only
        if update.first_token_index != len(token_ids):
            raise BrokenStreamError(
                f"the stream goes on at token {update.first_token_index} of sequence {index}, "
                f"not at {len(token_ids)}"
            )
        token_ids.extend(update.token_ids)
        if update.finish is not None:
            self._finishes[index] = update.finish
            self._is_cancelled |= update.finish.reason is FinishReason.CANCELLED
        self._retries.progressed(now_s)
        return update

    def end(self, error: grpc.RpcError | BrokenStreamError, now_s: float) -> float:
        """Take the end of an attempt; return the seconds to wait before the next one.

        Raises:
            ExpertmeshError: There is no other attempt.
        """
        if self._is_cancelled:
            return 0.0
        if isinstance(error, BrokenStreamError):
            failure = Failure(code=grpc.StatusCode.UNAVAILABLE, message=str(error))
        else:
            failure = failure_of(error)
        wait_s = self._retries.after(failure, now_s)
        # The server believes in a connection that was lost, so the request was admitted by it. A
        # loss alone does not say so: whoever may never have arrived must not pass a full queue by.
        self._is_admitted |= failure.code is grpc.StatusCode.ALREADY_EXISTS
        return wait_s

    def cancel(self) -> None:
        """Note that the server was asked to cancel the request."""
        self._is_cancelled = True

    def cancelled_rest(self) -> list[Update]:
        """Return the ends that a cancelled request's broken stream did not bring.

        Cancelling ends all sequences of a request; to send it again would begin it anew.
        """
        if not self._is_cancelled:
            return []
        usages = [finish.usage for finish in self._finishes.values()]
        rest = [index for index in range(len(self._token_ids)) if index not in self._finishes]
        return [self._cancelled(index, usages[0] if usages else Usage()) for index in rest]

    def _cancelled(self, index: int, other: Usage) -> Update:
        num_tokens = len(self._token_ids[index])
        usage = replace(other, completion_tokens=num_tokens)
        finish = Finish(reason=FinishReason.CANCELLED, usage=usage)
        self._finishes[index] = finish
        return Update(sequence_index=index, first_token_index=num_tokens, finish=finish)

    def _take_seed(self, seed: int) -> None:
        if self.seed is not None and seed != self.seed:
            raise BrokenStreamError(f"the stream has seed {seed}, not {self.seed}")
        self.seed = seed
