"""One step at a time on rank 0: schedule, forward on all ranks, sample, commit, emit.

A step is all or nothing for each sequence: tokens, states and counts change after the forward and
the sampling of a whole batch have succeeded. A batch that fails is tried once more, then in
halves, until what fails is alone: those sequences end with an error, the others never notice. So
do all sequences of a request whose rows end expert workers, which the dispatcher finds out.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from torch import Tensor

from workers.clock import Clock
from workers.errors import (
    DuplicateRequestError,
    FieldViolation,
    GatewayFailedError,
    InvalidRequestError,
    OverloadedError,
    PoisonError,
)
from workers.gateway.capture import CaptureBook
from workers.gateway.lockstep import Leader
from workers.gateway.scheduler import Scheduler, SchedulerOptions, Work
from workers.gateway.sequence import Phase, Sequence
from workers.gateway.snapshot import Holder, Snapshot
from workers.gateway.survival import Survival
from workers.model.batch import StepBatch
from workers.model.sampler import Choice, SamplerState, sample, score
from workers.types import FinishReason, GatewayStats, Request, TokenEvent, TokenLogprob

RETRY_AFTER_S = 1.0  # what a client is told when the queue is full
NO_SNAPSHOTS: Mapping[int, Snapshot] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Limits on requests; `max_waiting` sequences may wait beyond those that can run at once."""

    scheduler: SchedulerOptions
    vocab_size: int
    context_tokens: int
    max_waiting: int


@dataclass(slots=True)
class _Counters:
    steps: int = 0
    step_s: float = 0.0
    tokens_generated: int = 0
    tokens_prefilled: int = 0


@dataclass(frozen=True, slots=True)
class _Result:
    """What a batch brought to one sequence."""

    scores: list[TokenLogprob]
    choice: Choice | None


@dataclass(frozen=True, slots=True)
class _Sending:
    """A prefix that another gateway asks for, and whether it is kept."""

    digest: int
    name: str
    receiver: Holder
    most_tokens: int
    is_kept: "Future[bool]"


@dataclass(slots=True)
class _Computed:
    """What came of a batch: the events of what succeeded, and what failed on its own."""

    events: list[TokenEvent] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)


class GatewayEngine:
    """The requests of one gateway.

    `step` belongs to one thread; everything else may be called from any, also while a step runs.
    What is cancelled meanwhile frees its blocks when that step ends.
    """

    def __init__(
        self,
        options: EngineOptions,
        leader: Leader,
        clock: Clock,
        *,
        book: CaptureBook | None = None,
    ) -> None:
        self._options = options
        self._leader = leader
        self._clock = clock
        self._lock = threading.Lock()  # over all below; never held during a forward
        self._book = book or CaptureBook(0)
        self._survival = Survival(self._book, leader.enqueue)
        self._scheduler = Scheduler(options.scheduler, self._survival, leader.enqueue)
        self._requests: dict[str, list[Sequence]] = {}  # with unfinished sequences
        self._samplers: dict[Sequence, SamplerState] = {}
        self._over: list[Sequence] = []  # resumed with all their tokens there already
        self._aborted: set[Sequence] = set()  # hold their blocks until the step's end
        self._sending: list[_Sending] = []  # until the next step
        self._num_submitted = 0
        self._counters = _Counters()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests or self._aborted or self._sending)

    def submit(self, request: Request, snapshots: Mapping[int, Snapshot] = NO_SNAPSHOTS) -> None:
        """Queue a request; its events come out of later steps.

        Sequences with a snapshot, which the caller has checked, go on from there.

        Raises:
            InvalidRequestError: The request breaks a limit of the model or of this gateway.
            DuplicateRequestError: A request with this id is running.
            OverloadedError: Too many sequences wait; never for a request that was begun elsewhere.
        """
        _check(request, self._options)
        self._scheduler.check_fits(request)
        with self._lock:
            if request.request_id in self._requests:
                raise DuplicateRequestError(f"request {request.request_id} is running here already")
            room = self._options.max_waiting + self._scheduler.states.num_free
            waiting = self._scheduler.num_fresh
            was_begun = request.was_admitted or any(request.emitted) or request.deaths > 0
            if waiting + request.num_sequences > room and not was_begun:
                raise OverloadedError(
                    f"{waiting} sequences wait here; there is no room for "
                    f"{request.num_sequences} more",
                    RETRY_AFTER_S,
                )
            sequences = [
                Sequence(request, index, self._num_submitted + index)
                for index in range(request.num_sequences)
            ]
            self._num_submitted += len(sequences)
            self._requests[request.request_id] = sequences
            for sequence in sequences:
                self._survival.begin(sequence, snapshots.get(sequence.index))
                if sequence.finish is not None:
                    self._over.append(sequence)
                else:
                    self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Cancel what is unfinished of a request: no further event of it comes.

        Its id is free at once, its blocks are when the running step ends. An unknown id is no
        error: the request may just have ended.
        """
        with self._lock:
            self._aborted.update(self._requests.pop(request_id, ()))

    def send_prefix(
        self, digest: int, name: str, receiver: Holder, most_tokens: int
    ) -> "Future[bool]":
        """Send a kept prefix to another gateway, as a snapshot of a request of this name.

        One of the next steps says whether it is kept, and has no more than `most_tokens`.
        """
        sending = _Sending(digest, name, receiver, most_tokens, Future())
        with self._lock:
            self._sending.append(sending)
        return sending.is_kept

    def keeps_prefix(self, digest: int) -> bool:
        """Whether the state of a prefix is kept here."""
        with self._lock:
            return self._scheduler.prefixes.tree.find(digest) is not None

    def leave(self) -> None:
        """Let sequences go on elsewhere, each as soon as a snapshot of it is held there.

        Their last event here is `MOVED`. What nobody can hold is finished here.
        """
        with self._lock:
            self._survival.leave()

    def step(self) -> list[TokenEvent]:
        """Run one step and return what it brought, in order for each sequence.

        Raises:
            GatewayFailedError: A rank is gone or out of step, or several requests failed alike.
        """
        started_s = self._clock.now_s()
        with self._lock:
            events = self._reap()
            self._send_prefix()
            work = self._scheduler.schedule()
        if work:
            computed = self._compute(work, retries=1)
            failed = [(s, e) for s, e in computed.failed if not isinstance(e, PoisonError)]
            requests = {sequence.request.request_id for sequence, _ in failed}
            if failed and len(computed.failed) == len(work) and len(requests) > 1:
                raise GatewayFailedError(f"all requests fail, at last: {failed[-1][1]!r}")
            with self._lock:
                events += computed.events
                events += [
                    self._end(sequence, FinishReason.ERROR, f"{type(error).__name__}: {error}")
                    for sequence, error in self._with_siblings(computed.failed)
                    if sequence not in self._aborted
                ]
                events += self._reap()
        with self._lock:
            movable = self._survival.movable(self._requests)
            events += [self._end(sequence, FinishReason.MOVED) for sequence in movable]
        self._counters.steps += 1
        self._counters.step_s += self._clock.now_s() - started_s
        return events

    def stats(self) -> GatewayStats:
        """Return load and counters of this engine; the dispatcher's counters are not in it."""
        with self._lock:
            scheduler, counters = self._scheduler, self._counters
            survival = self._survival
            prefixes = scheduler.prefixes
            return GatewayStats(
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                kv_blocks_used=scheduler.kv.num_used,
                kv_blocks_total=scheduler.kv.num_blocks,
                state_blocks_used=scheduler.states.num_used,
                state_blocks_total=scheduler.states.num_blocks,
                steps=counters.steps,
                tokens_generated=counters.tokens_generated,
                tokens_prefilled=counters.tokens_prefilled,
                preemptions=scheduler.num_preemptions,
                step_s=counters.step_s,
                snapshots_stored=self._book.num_stored,
                snapshots_skipped=self._book.num_skipped,
                restores=survival.restores,
                recomputes=survival.recomputes,
                replayed_tokens=survival.replayed_tokens,
                recomputed_tokens=survival.recomputed_tokens,
                moved=survival.moved,
                prefix_lookups=prefixes.counters.lookups,
                prefix_hits=prefixes.counters.hits,
                prefix_hit_tokens=prefixes.counters.hit_tokens,
                prefix_blocks=scheduler.kv.num_kept,
                prefix_states=prefixes.tree.num_states,
                prefix_block_evictions=prefixes.tree.num_block_evictions,
                prefix_state_evictions=prefixes.tree.num_state_evictions,
                prefix_fetches=survival.fetches,
                prefix_fetched_tokens=survival.fetched_tokens,
            )

    def prefixes(self, most: int) -> dict[int, int]:
        """Return the digests of the prefixes whose states are kept, with their numbers of tokens.

        When there are more than `most`, those that were used last.
        """
        with self._lock:
            kept = islice(self._scheduler.prefixes.tree.checkpoints(), most)
            return {checkpoint.digest: checkpoint.num_tokens for checkpoint in kept}

    def _compute(self, work: list[Work], *, retries: int) -> _Computed:
        if not work:
            return _Computed()
        for attempts_left in range(retries, -1, -1):
            try:
                results = self._attempt(work)
            except GatewayFailedError:
                raise
            except PoisonError as error:  # known at once, and nobody is to be harmed by it again
                ended = {work[i].sequence.request.request_id for i in error.segments}
                others = [w for w in work if w.sequence.request.request_id not in ended]
                computed = self._compute(others, retries=retries)
                harmful = [w.sequence for w in work if w.sequence.request.request_id in ended]
                computed.failed += [(sequence, error) for sequence in harmful]
                return computed
            except Exception as error:  # noqa: BLE001 - whatever a model or a dispatcher raises
                if attempts_left == 0 and len(work) == 1:
                    return _Computed(failed=[(work[0].sequence, error)])
            else:
                return _Computed(events=self._commit(work, results))
        middle = len(work) // 2
        first = self._compute(work[:middle], retries=0)
        second = self._compute(work[middle:], retries=0)
        return _Computed(first.events + second.events, first.failed + second.failed)

    def _with_siblings(
        self, failed: list[tuple[Sequence, Exception]]
    ) -> list[tuple[Sequence, Exception]]:
        """Add the sequences that would end expert workers next, as they have the same prompt."""
        errors = dict(failed)
        for sequence, error in failed:
            siblings = self._requests.get(sequence.request.request_id, [])
            if isinstance(error, PoisonError) and sequence in siblings:
                errors |= {s: error for s in siblings if s not in errors and s.finish is None}
        return list(errors.items())

    def _attempt(self, work: list[Work]) -> list[_Result]:
        """Run one batch; its states are committed on return, and discarded when it raises."""
        logits_RV = self._leader.compute(StepBatch(segments=tuple(w.segment for w in work)))
        try:
            results = self._read(work, logits_RV)
        except Exception:
            self._leader.discard()
            raise
        self._leader.commit()
        return results

    def _read(self, work: list[Work], logits_RV: Tensor) -> list[_Result]:
        """Return the prompt scores and the chosen token of each sequence of a batch."""
        scores: list[list[TokenLogprob]] = []
        sampling_rows: list[int] = []
        samplers: list[SamplerState] = []
        end = 0
        for w in work:
            start, end = end, end + w.segment.num_logits
            targets = w.sequence.scored_tokens(w.segment)
            num_top = w.sequence.request.output.prompt_logprobs or 0
            scores.append(score(logits_RV[start : start + len(targets)], targets, num_top))
            if w.sequence.samples(w.segment):
                sampling_rows.append(end - 1)
                samplers.append(self._sampler(w.sequence))
        if len(sampling_rows) != logits_RV.shape[0]:
            logits_RV = logits_RV[sampling_rows]
        choices = iter(sample(logits_RV, samplers))
        chosen = [next(choices) if w.sequence.samples(w.segment) else None for w in work]
        return [_Result(*result) for result in zip(scores, chosen, strict=True)]

    def _sampler(self, sequence: Sequence) -> SamplerState:
        if sequence not in self._samplers:
            completion = sequence.tokens[sequence.num_prompt :]
            self._samplers[sequence] = SamplerState(sequence.request, sequence.index, completion)
        return self._samplers[sequence]

    def _commit(self, work: list[Work], results: list[_Result]) -> list[TokenEvent]:
        with self._lock:
            events = [self._advance(w, r) for w, r in zip(work, results, strict=True)]
        return [event for event in events if event is not None]

    def _advance(self, work: Work, result: _Result) -> TokenEvent | None:
        sequence, choice = work.sequence, result.choice
        first_index = sequence.num_completion
        if sequence.phase is Phase.PREFILLING:
            self._counters.tokens_prefilled += len(work.segment.token_ids)
        reason = sequence.commit(work.segment, result.scores, choice.token_id if choice else None)
        self._scheduler.advanced(sequence)
        if reason is None and sequence not in self._aborted:
            self._survival.advance(sequence)
        if choice is None:
            return None
        self._counters.tokens_generated += 1
        self._samplers[sequence].append(choice.token_id)
        if sequence in self._aborted:
            return None
        if reason is not None:
            self._free(sequence, reason)
        is_first = first_index == 0 and sequence.prompt_logprobs is not None
        return TokenEvent(
            request_id=sequence.request.request_id,
            sequence_index=sequence.index,
            assignment=sequence.request.assignment,
            first_token_index=first_index,
            token_ids=(choice.token_id,),
            logprobs=() if choice.logprob is None else (choice.logprob,),
            prompt_logprobs=tuple(sequence.prompt_logprobs or ()) if is_first else (),
            finish=reason,
            stop_token_id=choice.token_id if reason is FinishReason.STOP else None,
            cached_tokens=sequence.cached_tokens or 0,
        )

    def _reap(self) -> list[TokenEvent]:
        """Free what was aborted; return the events of what came with all its tokens."""
        for sequence in self._aborted:
            if sequence.finish is None:
                self._free(sequence, FinishReason.CANCELLED)
        over = [sequence for sequence in self._over if sequence not in self._aborted]
        self._over.clear()
        self._aborted.clear()
        return [self._end(sequence, sequence.finish) for sequence in over if sequence.finish]

    def _send_prefix(self) -> None:
        """Have all ranks copy aside what was asked for, one in a step: whoever decodes waits."""
        if not self._sending:
            return
        sending = self._sending.pop(0)
        if not sending.is_kept.set_running_or_notify_cancel():
            return  # given up meanwhile
        kept = self._scheduler.prefixes.kept(sending.digest)
        is_sent = kept is not None and len(kept.token_ids) <= sending.most_tokens
        if kept is not None and is_sent:
            self._survival.send(kept, sending.name, sending.receiver)
        sending.is_kept.set_result(is_sent)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> TokenEvent:
        """End a sequence without a further token."""
        self._free(sequence, reason)
        return TokenEvent(
            request_id=sequence.request.request_id,
            sequence_index=sequence.index,
            assignment=sequence.request.assignment,
            first_token_index=sequence.num_completion,
            token_ids=(),
            finish=reason,
            stop_token_id=sequence.tokens[-1] if reason is FinishReason.STOP else None,
            cached_tokens=sequence.cached_tokens or 0,
            error=error,
        )

    def _free(self, sequence: Sequence, reason: FinishReason) -> None:
        """Free what a sequence holds, and its request's id with the last one."""
        if sequence.finish is None:
            self._scheduler.finish(sequence, reason)
        self._survival.end(sequence, reason)
        self._samplers.pop(sequence, None)
        request_id = sequence.request.request_id
        siblings = self._requests.get(request_id, [])
        if sequence in siblings:  # else it was aborted, and the id may be another request's
            siblings.remove(sequence)
            if not siblings:
                del self._requests[request_id]


def _check(request: Request, options: EngineOptions) -> None:
    """Refuse what the model cannot compute, naming each wrong field."""
    vocab_size = options.vocab_size
    stopping, num_prompt = request.stopping, len(request.prompt_token_ids)
    known = range(vocab_size)
    tokens_by_field = {
        "prompt": request.prompt_token_ids,
        "resume_from": tuple(t for tokens in request.emitted for t in tokens),
        "sampling.logit_bias": tuple(t for t, _ in request.sampling.logit_bias),
        "stopping.stop_token_ids": tuple(stopping.ending_ids),
    }
    violations = [
        FieldViolation(name, f"token ids must be in 0 to {vocab_size - 1}")
        for name, tokens in tokens_by_field.items()
        if any(token not in known for token in tokens)
    ]
    if num_prompt == 0:
        violations.append(FieldViolation("prompt", "must hold at least one token"))
    if stopping.max_tokens < 1:
        violations.append(FieldViolation("stopping.max_tokens", "must be at least 1"))
    if num_prompt + stopping.max_tokens > options.context_tokens:
        violations.append(
            FieldViolation(
                "stopping.max_tokens",
                f"{num_prompt} prompt tokens and {stopping.max_tokens} new ones exceed the "
                f"context of {options.context_tokens}",
            )
        )
    if request.num_sequences < 1:
        violations.append(FieldViolation("sampling.num_sequences", "must be at least 1"))
    if request.emitted and len(request.emitted) != request.num_sequences:
        violations.append(FieldViolation("resume_from", "must have one entry for each sequence"))
    if violations:
        raise InvalidRequestError(*violations)
