"""One continuation of one request inside one gateway: its tokens, and how far they are computed."""

from enum import Enum

from workers.model.batch import Segment
from workers.types import FinishReason, Request, TokenLogprob


class Phase(Enum):
    """Where a sequence stands; follows from its blocks, tokens and finish reason."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


class Sequence:
    """A sequence holds blocks exactly while it is prefilling or decoding.

    `tokens` are prompt and completion so far. Of these, the first `computed` are committed to the
    cache; those beyond are pending. A sequence that has one pending token decodes, one that has
    several prefills (for the first time, after preemption, or to resume what another gateway
    began). `order` is the age among all sequences of the gateway: lower is older.

    `cached_tokens` of the prompt were not computed when the sequence was first admitted; None until
    then. `cuts` are the positions at which its prefill pauses, so that its state there is kept.
    A sequence is restored if it went on from another gateway's snapshot.

    `prompt_logprobs` fills up as the prompt is computed, once: preemption does not clear it. It
    stays None unless asked for, on sequence 0, by a client that has no tokens yet.
    """

    def __init__(self, request: Request, index: int, order: int) -> None:
        emitted = request.emitted[index] if request.emitted else ()
        self.request = request
        self.index = index
        self.order = order
        self.tokens = [*request.prompt_token_ids, *emitted]
        self.num_prompt = len(request.prompt_token_ids)
        self.computed = 0
        self.kv_blocks: list[int] = []
        self.state_block: int | None = None
        self.cuts: tuple[int, ...] = ()
        self.cached_tokens: int | None = None
        self.is_restored = False
        self.returning = bool(emitted)  # resumed or preempted: waits ahead of those never admitted
        wants_scores = request.output.prompt_logprobs is not None and index == 0 and not emitted
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if wants_scores else None
        self.finish: FinishReason | None = self._reason_to_finish() if emitted else None

    @property
    def phase(self) -> Phase:
        """Where the sequence stands now."""
        if self.finish is not None:
            return Phase.FINISHED
        if self.state_block is None:
            return Phase.WAITING
        return Phase.DECODING if self.pending == 1 else Phase.PREFILLING

    @property
    def pending(self) -> int:
        """Tokens that are known and not yet computed."""
        return len(self.tokens) - self.computed

    @property
    def num_completion(self) -> int:
        """Completion tokens so far, with those that the client had before a resumption."""
        return len(self.tokens) - self.num_prompt

    def segment(self, num_tokens: int) -> Segment:
        """Return the next pending tokens as the work of one step, with the logits that it needs.

        Logits are needed for the row of the last known token, from which the next one is sampled,
        and for the rows whose successor in the prompt still wants a log-probability.
        """
        assert self.state_block is not None
        assert 0 < num_tokens <= self.pending
        end = self.computed + num_tokens
        num_logits = int(end == len(self.tokens))
        scored_row = self._next_row_to_score(end)
        if scored_row is not None:
            num_logits = end - scored_row
        return Segment(
            token_ids=tuple(self.tokens[self.computed : end]),
            start=self.computed,
            state_block=self.state_block,
            kv_blocks=tuple(self.kv_blocks),
            num_logits=num_logits,
        )

    def scored_tokens(self, segment: Segment) -> list[int]:
        """Return the prompt tokens that the segment's logits score, in order of its rows."""
        end = segment.start + len(segment.token_ids)
        row = self._next_row_to_score(end)
        return [] if row is None else self.tokens[row + 1 : min(end + 1, self.num_prompt)]

    def samples(self, segment: Segment) -> bool:
        """Whether the segment reaches the last known token, so that the next one is sampled."""
        return segment.start + len(segment.token_ids) == len(self.tokens)

    def commit(
        self, segment: Segment, scores: list[TokenLogprob], token_id: int | None
    ) -> FinishReason | None:
        """Take over what a successful step computed; return why the sequence ends, if it does."""
        self.computed += len(segment.token_ids)
        if scores:
            assert self.prompt_logprobs is not None
            self.prompt_logprobs.extend(scores)
        if token_id is None:
            return None
        self.tokens.append(token_id)
        return self._reason_to_finish()

    @property
    def first_unscored_row(self) -> int | None:
        """The first row of the prompt whose logits are still wanted; None when there is none."""
        if self.prompt_logprobs is None:
            return None
        row = len(self.prompt_logprobs) - 1  # the row of the last token that has its entry
        return row if row < self.num_prompt - 1 else None

    def _next_row_to_score(self, end: int) -> int | None:
        """Return the first row before `end` whose successor is an unscored prompt token."""
        row = self.first_unscored_row
        return row if row is not None and self.computed <= row < end else None

    def _reason_to_finish(self) -> FinishReason | None:
        stopping = self.request.stopping
        if self.num_completion > stopping.min_tokens and self.tokens[-1] in stopping.ending_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_completion >= stopping.max_tokens else None
