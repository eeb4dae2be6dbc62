"""What both clients share: requests made complete, and the journeys that are under way."""

import itertools
import random
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

from expertmesh_client import translate
from expertmesh_client._pb.expertmesh.v1 import inference_pb2 as pb
from expertmesh_client.clock import now_s
from expertmesh_client.errors import (
    DeadlineError,
    ExpertmeshError,
    NotFoundError,
    UnavailableError,
)
from expertmesh_client.journey import Journey
from expertmesh_client.retry import Retries, RetryPolicy
from expertmesh_client.types import Message, RequestOptions, Tool

_ASK_AGAIN_S = 0.05
_ANSWER_S = 5.0  # that one target is waited for, while others may know the request

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
        self, timeout_s: float | None, request_id: str = "", *, only_at: int | None = None
    ) -> Retries:
        """Return the attempts of a call; a single one, where it may go to one target only."""
        once = replace(self._policy, max_failures=0)
        return Retries(
            self._policy if only_at is None else once,
            targets=range(self.num_targets) if only_at is None else (only_at,),
            turn=next(self._turns),
            timeout_s=timeout_s,
            now_s=now_s(),
            chance=self._chance,
            request_id=request_id,
        )

    def cancellation(self, request_id: str, timeout_s: float) -> "Cancellation":
        """Return the way to end a request; if it is under way here, it is not sent again."""
        journey = self._journeys.get(request_id)
        if journey is not None:
            journey.cancel()
        return Cancellation(journey, self.num_targets, deadline_s=now_s() + timeout_s)

    def _completed(self, options: RequestOptions) -> RequestOptions:
        request_id = options.get("request_id") or uuid.uuid4().hex
        return {**options, "request_id": request_id, "model": self.model(options.get("model"))}


class Cancellation:
    """Asks one target after the other to end a request, until one of them has.

    A request of this client may be between two targets: it is asked for until it has ended. So is
    any request while no target can be reached.

    Args:
        journey: The request, if it is under way here.
        num_targets: How many may know it.
        deadline_s: When to stop asking.
    """

    def __init__(self, journey: AnyJourney | None, num_targets: int, *, deadline_s: float) -> None:
        self.target = 0
        self._journey = journey
        self._num_targets = num_targets
        self._deadline_s = deadline_s
        self._refusals: list[ExpertmeshError] = []

    @property
    def is_over(self) -> bool:
        """Whether the request has ended without anybody's word."""
        return self._journey is not None and self._journey.is_complete

    def timeout_s(self, time_s: float) -> float:
        """Return for how long the next target may be waited for."""
        left_s = max(0.0, self._deadline_s - time_s)
        return left_s if self._num_targets == 1 else min(left_s, _ANSWER_S)

    def refused(self, error: ExpertmeshError, time_s: float) -> float:
        """Take a target's refusal; return the seconds to wait before the next one is asked.

        Raises:
            ExpertmeshError: The request may run on.
        """
        self._refusals.append(error)
        self.target = (self.target + 1) % self._num_targets
        if self.target > 0:
            return 0.0
        refusals, self._refusals = self._refusals, []
        unsure = [each for each in refusals if not isinstance(each, NotFoundError)]
        lost = [each for each in unsure if isinstance(each, UnavailableError | DeadlineError)]
        is_nobody_heard = len(lost) == len(refusals)
        is_of_here = self._journey is not None and len(lost) == len(unsure)
        if not (is_nobody_heard or is_of_here) or time_s >= self._deadline_s:
            raise (unsure or refusals)[0]
        return _ASK_AGAIN_S
