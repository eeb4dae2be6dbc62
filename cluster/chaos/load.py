"""The load: so many requests at once, of mixed lengths and settings, each drawn from the seed."""

import asyncio
import random
from typing import Any

import grpc

from cluster.chaos.history import Answer, Arrival, Ask
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from workers.clock import Clock

_PROMPT_TOKENS = (1, 8, 40, 120)
_MAX_TOKENS = (16, 48, 96, 200)
_DEADLINE_S = 600.0


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
    )


def message_of(ask: Ask) -> pb.GenerateRequest:
    """Return a request as it is sent."""
    return pb.GenerateRequest(
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


class Load:
    """Keeps `concurrency` requests under way until it is told to stop; the last ones finish."""

    def __init__(
        self,
        stub: Any,  # noqa: ANN401
        *,
        concurrency: int,
        seed: int,
        vocabulary_size: int,
        clock: Clock,
    ) -> None:
        self._stub = stub
        self._concurrency = concurrency
        self._seed = seed
        self._vocabulary_size = vocabulary_size
        self._clock = clock
        self._stopping = False
        self._next = 0
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
        """Send one request and write down all that comes."""
        try:
            async for response in self._stub.Generate(message_of(answer.ask), timeout=_DEADLINE_S):
                self._note(answer, response)
        except grpc.aio.AioRpcError as error:
            answer.error = f"{error.code().name}: {error.details()}"

    def _note(self, answer: Answer, response: pb.GenerateResponse) -> None:
        sequence = response.sequence_index
        if response.token_ids:
            arrival = Arrival(
                self._clock.now_s(), response.first_token_index, tuple(response.token_ids)
            )
            answer.arrivals.setdefault(sequence, []).append(arrival)
        if response.HasField("finish"):
            reason = pb.FinishReason.Name(response.finish.reason)
            answer.finishes[sequence] = reason.rpartition("_")[2]
