"""The load: so many requests at once, of mixed lengths and settings, each drawn from the seed."""

import asyncio
import random
from typing import Any

import grpc

from cluster.chaos.doors import Door, Doors
from cluster.chaos.history import Answer, Arrival, Ask
from cluster.frontdoor.flight import ROUTE_KEY
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from workers.clock import Clock

_PROMPT_TOKENS = (1, 8, 40, 120)
_MAX_TOKENS = (16, 48, 96, 200)
_WINDOWS_S = (0.0, 30.0)
_DEADLINE_S = 600.0
_MOST_CALLS = 40
_RETRY_S = (0.05, 0.3)
# What a client sees of a front door or connection that is gone; its request is none the worse.
_STATUS_DETAILS = "grpc-status-details-bin"
_BROKEN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


def draw_ask(seed: int, number: int, vocabulary_size: int) -> Ask:
    """Return a request of the load: the same for the same seed and number."""
    draw = random.Random(f"{seed}/{number}")  # noqa: S311 - a load, not a secret
    return Ask(
        number=number,
        prompt_token_ids=tuple(
            draw.randrange(vocabulary_size) for _ in range(draw.choice(_PROMPT_TOKENS))
        ),
        max_tokens=draw.choice(_MAX_TOKENS),
        temperature=draw.choice((0.0, 0.0, 0.7, 1.0)),
        top_p=draw.choice((1.0, 0.9)),
        seed=draw.randrange(2**31),
        num_sequences=draw.choice((1, 1, 1, 1, 1, 2)),
        resume_window_s=draw.choice(_WINDOWS_S),
    )


def message_of(answer: Answer, request_id: str) -> pb.GenerateRequest:
    """Return a request as it is sent, with all that its client has already."""
    ask = answer.ask
    resume_from = [
        pb.ResumePoint(sequence_index=index, token_ids=answer.token_ids(index))
        for index in range(ask.num_sequences)
    ]
    return pb.GenerateRequest(
        request_id=request_id,
        resume_window_s=ask.resume_window_s,
        resume_from=resume_from if answer.breaks else (),
        token_ids=pb.TokenIds(ids=ask.prompt_token_ids),
        sampling=pb.Sampling(
            temperature=ask.temperature,
            top_p=ask.top_p,
            top_k=0,
            min_p=0,
            presence_penalty=0,
            frequency_penalty=0,
            repetition_penalty=1,
            seed=ask.seed,
            num_sequences=ask.num_sequences,
        ),
        stopping=pb.Stopping(max_tokens=ask.max_tokens, ignore_eos=True),
    )


def note(answer: Answer, response: pb.GenerateResponse, at_s: float) -> None:
    """Write down what has come."""
    sequence = response.sequence_index
    if response.token_ids:
        arrival = Arrival(at_s, response.first_token_index, tuple(response.token_ids))
        answer.arrivals.setdefault(sequence, []).append(arrival)
    if response.HasField("finish"):
        reason = pb.FinishReason.Name(response.finish.reason)
        answer.finishes[sequence] = reason.rpartition("_")[2]


def legs_of(trailing_metadata: Any) -> list[tuple[str, int]]:  # noqa: ANN401 - as gRPC has it
    """Return which gateways had a call, and how many tokens were known when each took it."""
    route = dict(trailing_metadata or ()).get(ROUTE_KEY, "")
    return [(leg.partition("@")[0], int(leg.partition("@")[2])) for leg in route.split()]


def _is_break(error: grpc.aio.AioRpcError) -> bool:
    """Whether a stream broke; what a front door says itself is another matter, unless it leaves."""
    metadata: Any = error.trailing_metadata() or ()
    is_its_word = any(key == _STATUS_DETAILS for key, _ in metadata)
    is_leaving = "draining" in (error.details() or "")
    return error.code() in _BROKEN and (is_leaving or not is_its_word)


class Load:
    """Keeps `concurrency` requests under way until it is told to stop; the last ones finish.

    A client whose stream breaks comes back through another front door with all that it has.
    """

    def __init__(
        self,
        doors: Doors,
        *,
        concurrency: int,
        seed: int,
        vocabulary_size: int,
        clock: Clock,
    ) -> None:
        self._doors = doors
        self._concurrency = concurrency
        self._seed = seed
        self._vocabulary_size = vocabulary_size
        self._clock = clock
        self._stopping = False
        self._next = 0
        self._draw = random.Random(f"{seed}/retries")  # noqa: S311 - a load, not a secret
        self.answers: list[Answer] = []

    async def run(self) -> None:
        """Send requests until `stop`."""
        await asyncio.gather(*(self._client() for _ in range(self._concurrency)))

    def stop(self) -> None:
        """Send no further requests."""
        self._stopping = True

    async def _client(self) -> None:
        while not self._stopping:
            ask = draw_ask(self._seed, self._next, self._vocabulary_size)
            self._next += 1
            answer = Answer(ask, self._clock.now_s())
            self.answers.append(answer)
            await self._follow(answer)

    async def _follow(self, answer: Answer) -> None:
        """Send one request, again while its stream breaks, and write down all that comes."""
        request_id = f"load-{self._seed}-{answer.ask.number}"
        door: Door | None = None
        while not answer.is_complete:
            door = self._doors.pick(other_than=door)
            try:
                await self._call(door, answer, request_id)
            except grpc.aio.AioRpcError as error:
                problem = f"{error.code().name}: {error.details()}"
                if not _is_break(error) or len(answer.breaks) == _MOST_CALLS:
                    answer.error = problem
                    return
                answer.breaks.append(problem)
            else:
                return
            await asyncio.sleep(self._draw.uniform(*_RETRY_S))

    async def _call(self, door: Door, answer: Answer, request_id: str) -> None:
        call = door.inference.Generate(message_of(answer, request_id), timeout=_DEADLINE_S)
        async for response in call:
            note(answer, response, self._clock.now_s())
        answer.legs = legs_of(await call.trailing_metadata())
