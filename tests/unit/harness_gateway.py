"""A model whose next token depends on the whole history, and engines over it, for gateway tests."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.gateway.capture import CaptureBook
from workers.gateway.engine import EngineOptions, GatewayEngine
from workers.gateway.lockstep import Leader, LoneVote, Take, drop
from workers.gateway.prefix_cache import PrefixOptions
from workers.gateway.scheduler import SchedulerOptions
from workers.model.batch import Segment, StepBatch
from workers.model.sampler import SamplerState, sample
from workers.types import Output, Request, Sampling, Stopping, TokenEvent

VOCAB_SIZE = 50


def history_logits(history: tuple[int, ...]) -> Tensor:
    """Return logits [V] that are a fixed function of all tokens so far."""
    digest = hashlib.blake2b(bytes(history), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return 3 * torch.randn(VOCAB_SIZE, generator=generator)


class HistoryModel:
    """Decoder and cache in one: keeps the tokens themselves in KV rows and recurrent states.

    Both are checked against each other at every step, so a block that is written to while another
    sequence or the prefix cache needs it, a state that was committed twice, a checkpoint of other
    tokens or a row that was not recomputed fails the step.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.batches: list[StepBatch] = []
        self.fail: Callable[[StepBatch], bool] = lambda _: False
        self._kv: dict[tuple[int, int], int] = {}
        self._states: dict[int, tuple[int, ...]] = {}
        self._staged: dict[int, tuple[int, ...]] = {}
        self._checkpoints: dict[int, tuple[int, ...]] = {}

    def forward(self, batch: StepBatch) -> Tensor:
        assert not self._staged, "the step before was neither committed nor discarded"
        self.batches.append(batch)
        held = Counter(b for s in batch.segments for b in s.kv_blocks)
        written = [b for s in batch.segments for b in s.kv_blocks[s.start // self.block_tokens :]]
        assert all(held[b] == 1 for b in written), "a block is written that another one reads"
        assert len({s.state_block for s in batch.segments}) == len(batch.segments)
        rows = [self._advance(s) for s in batch.segments]
        if self.fail(batch):
            raise RuntimeError("planned failure")
        flat = [row for some in rows for row in some]
        return torch.stack(flat) if flat else torch.empty(0, VOCAB_SIZE)

    def commit(self) -> None:
        self._states.update(self._staged)
        self._staged.clear()

    def discard(self) -> None:
        self._staged.clear()

    def copy_aside(self, state_block, kv_blocks, start, position):
        """Return what a shard holds: states, and rows by position."""
        assert not self._staged, "captured in the middle of a step"
        state = self._states[state_block]
        assert len(state) == position, "captured at another position than it says"
        places = [divmod(p, self.block_tokens) for p in range(start, position)]
        return state, [self._kv[kv_blocks[block], offset] for block, offset in places]

    def copy_kept_aside(self, place, kv_blocks, position):
        assert not self._staged, "captured in the middle of a step"
        state = self._checkpoints[place]
        places = [divmod(p, self.block_tokens) for p in range(position)]
        rows = [self._kv[kv_blocks[block], offset] for block, offset in places]
        assert list(state) == rows, "a checkpoint of other tokens than its blocks hold"
        return state, rows

    def restore(self, state_block, kv_blocks, shards) -> None:
        assert not self._staged, "restored in the middle of a step"
        ((state, rows),) = shards
        self._states[state_block] = state
        for position, token_id in enumerate(rows):
            block, offset = divmod(position, self.block_tokens)
            self._kv[kv_blocks[block], offset] = token_id

    def save_state(self, state_block: int, place: int) -> None:
        self._checkpoints[place] = self._states[state_block]

    def load_state(self, place: int, state_block: int) -> None:
        self._states[state_block] = self._checkpoints[place]

    def copy_kv_block(self, source: int, target: int) -> None:
        for offset in range(self.block_tokens):
            self._kv.pop((target, offset), None)
            if (source, offset) in self._kv:
                self._kv[target, offset] = self._kv[source, offset]

    def _advance(self, segment: Segment) -> list[Tensor]:
        before = self._states[segment.state_block] if segment.start else ()
        assert len(before) == segment.start
        history = before + segment.token_ids
        for position in range(segment.start, len(history)):
            self._kv[self._place(segment, position)] = history[position]
        assert history == tuple(self._kv[self._place(segment, p)] for p in range(len(history)))
        self._staged[segment.state_block] = history
        ends = range(len(history) - segment.num_logits + 1, len(history) + 1)
        return [history_logits(history[:end]) for end in ends]

    def _place(self, segment: Segment, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_tokens)
        return segment.kv_blocks[block], offset


@dataclass
class FakeClock:
    """A clock that stands still."""

    time_s: float = 0.0

    def now_s(self) -> float:
        return self.time_s


class LoneGroup:
    """A tensor-parallel group of one rank."""

    size = 1

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        assert payload is not None
        return payload


@dataclass
class Transcript:
    """What a client of an engine has seen, checked as it comes: indices without gap or repeat."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    last: dict[tuple[str, int], TokenEvent] = field(default_factory=dict)
    events: list[TokenEvent] = field(default_factory=list)

    def read(self, events: list[TokenEvent]) -> None:
        for event in events:
            key = (event.request_id, event.sequence_index)
            known = self.tokens.setdefault(key, [])
            if key not in self.last and event.first_token_index and event.finish is None:
                known.extend([-1] * event.first_token_index)  # a resumption
            assert key not in self.last or self.last[key].finish is None
            assert event.first_token_index == len(known) or not event.token_ids
            known.extend(event.token_ids)
            self.last[key] = event
            self.events.append(event)


def make_engine(
    *,
    step_tokens: int = 16,
    max_sequences: int = 4,
    block_tokens: int = 4,
    num_kv_blocks: int = 64,
    max_waiting: int = 100,
    context_tokens: int = 200,
    bit_stable: bool = False,
    book: CaptureBook | None = None,
    take: Take = drop,
    prefix: PrefixOptions | None = None,
) -> tuple[GatewayEngine, HistoryModel]:
    model = HistoryModel(block_tokens)
    options = EngineOptions(
        scheduler=SchedulerOptions(
            step_tokens=step_tokens,
            max_sequences=max_sequences,
            block_tokens=block_tokens,
            num_kv_blocks=num_kv_blocks,
            bit_stable=bit_stable,
            prefix=prefix or PrefixOptions(),
        ),
        vocab_size=VOCAB_SIZE,
        context_tokens=context_tokens,
        max_waiting=max_waiting,
    )
    leader = Leader(LoneGroup(), model.forward, model, LoneVote(), take)
    return GatewayEngine(options, leader, FakeClock(), book=book), model


def make_request(
    request_id: str = "r",
    prompt: tuple[int, ...] = (1, 2, 3),
    *,
    max_tokens: int = 5,
    output: Output | None = None,
    num_sequences: int = 1,
    emitted: tuple[tuple[int, ...], ...] = (),
    stopping: Stopping | None = None,
    cache_salt: str = "",
    **sampling: object,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=Sampling(**{"temperature": 0.0, **sampling}),
        stopping=stopping or Stopping(max_tokens=max_tokens),
        output=output or Output(),
        num_sequences=num_sequences,
        emitted=emitted,
        cache_salt=cache_salt,
    )


def run_to_end(engine: GatewayEngine, transcript: Transcript | None = None) -> Transcript:
    transcript = transcript or Transcript()
    for _ in range(10_000):
        if not engine.has_work:
            return transcript
        transcript.read(engine.step())
    raise AssertionError("the engine does not come to an end")


def expected_tokens(request: Request, index: int = 0) -> list[int]:
    """Return the completion that the history model must give, computed without any engine."""
    state = SamplerState(request, index)
    completion: list[int] = []
    while len(completion) < request.stopping.max_tokens:
        history = request.prompt_token_ids + tuple(completion)
        token_id = sample(history_logits(history)[None], [state])[0].token_id
        completion.append(token_id)
        state.append(token_id)
        over = len(completion) > request.stopping.min_tokens
        if over and token_id in request.stopping.ending_ids:
            break
    return completion
