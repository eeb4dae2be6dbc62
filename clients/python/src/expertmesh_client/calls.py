"""What both clients share: requests made complete, and the journeys that are under way."""

import itertools
import random
import uuid
from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

from expertmesh_client import translate
from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as pb
from expertmesh_client.clock import now_s
from expertmesh_client.errors import ExpertmeshError, NotFoundError
from expertmesh_client.journey import Journey
from expertmesh_client.retry import Retries, RetryPolicy
from expertmesh_client.types import Message, RequestOptions, Tool

AnyJourney = Journey[pb.GenerateRequest] | Journey[pb.ChatRequest]


class Calls:
    """Begins calls, each at the next target.

    Args:
        num_targets: How many there are.
        policy: When a call is sent again.
        model: What requests ask for that name no model.
        seed: Fixes the jitter, and the first target.
    """

    def __init__(
        self, num_targets: int, policy: RetryPolicy, *, model: str, seed: int | None
    ) -> None:
        self.num_targets = num_targets
        self._policy = policy
        self._model = model
        self._chance = random.Random(seed)  # noqa: S311  # spreads load, guards nothing
        self._turns = itertools.count(self._chance.randrange(num_targets))
        self._journeys: WeakValueDictionary[str, AnyJourney] = WeakValueDictionary()

    def generate(
        self, prompt: str | Sequence[int], options: RequestOptions
    ) -> Journey[pb.GenerateRequest]:
        """Return the journey of a Generate request."""
        request = translate.generate_request(prompt, self._completed(options))
        journey = Journey(request, self.retries(options.get("timeout_s"), request.request_id))
        self._journeys[request.request_id] = journey
        return journey

    def chat(
        self,
        messages: Iterable[Message],
        tools: Iterable[Tool],
        enable_thinking: bool | None,
        options: RequestOptions,
    ) -> Journey[pb.ChatRequest]:
        """Return the journey of a Chat request."""
        completed = self._completed(options)
        request = translate.chat_request(messages, tools, enable_thinking, completed)
        journey = Journey(request, self.retries(options.get("timeout_s"), request.request_id))
        self._journeys[request.request_id] = journey
        return journey

    def model(self, name: str | None) -> str:
        """Return the model that a call asks for."""
        return self._model if name is None else name

    def retries(
        self, timeout_s: float | None, request_id: str = "", *, target: int | None = None
    ) -> Retries:
        """Return the attempts of a call; at one target only, when it is given."""
        return Retries(
            self._policy,
            targets=range(self.num_targets) if target is None else (target,),
            turn=next(self._turns),
            timeout_s=timeout_s,
            now_s=now_s(),
            chance=self._chance,
            request_id=request_id,
        )

    def cancelled(self, request_id: str, refusals: Sequence[ExpertmeshError]) -> None:
        """Take what the targets said to a Cancel; nothing when one of them has done it.

        Raises:
            ExpertmeshError: The request may run on.
        """
        journey = self._journeys.get(request_id)
        is_here = journey is not None and not journey.is_complete
        unsure = [error for error in refusals if not isinstance(error, NotFoundError)]
        if unsure or (refusals and not is_here):
            raise (unsure or refusals)[0]
        if journey is not None:
            journey.cancel()  # it is not sent again

    def _completed(self, options: RequestOptions) -> RequestOptions:
        request_id = options.get("request_id") or uuid.uuid4().hex
        return {**options, "request_id": request_id, "model": self.model(options.get("model"))}
