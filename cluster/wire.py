"""gateway.proto <-> the words of the data plane, for both ends of a session, and of a push."""

from collections.abc import Iterable, Mapping

from cluster.ownership.directory import Claim
from cluster.pb.expertmesh.v1 import cluster_pb2, gateway_pb2, inference_pb2
from workers.errors import (
    DrainingError,
    DuplicateRequestError,
    ExpertmeshError,
    FieldViolation,
    InvalidRequestError,
    IsolatedError,
    OverloadedError,
    SnapshotError,
    StaleAssignmentError,
)
from workers.gateway.snapshot import Ended, Shard, Stamp, Verdict
from workers.model.packed import PackedShard
from workers.types import (
    FinishReason,
    GatewayStats,
    Output,
    PrefixPlace,
    Request,
    Sampling,
    SnapshotPlace,
    Stopping,
    TokenEvent,
    TokenLogprob,
)

_FINISHES = {
    FinishReason.STOP: gateway_pb2.EVENT_FINISH_STOP,
    FinishReason.LENGTH: gateway_pb2.EVENT_FINISH_LENGTH,
    FinishReason.CANCELLED: gateway_pb2.EVENT_FINISH_CANCELLED,
    FinishReason.ERROR: gateway_pb2.EVENT_FINISH_ERROR,
    FinishReason.MOVED: gateway_pb2.EVENT_FINISH_MOVED,
}
_REASONS = {number: reason for reason, number in _FINISHES.items()}
_VERDICTS = {
    Verdict.STORED: gateway_pb2.SNAPSHOT_VERDICT_STORED,
    Verdict.COMPLETE: gateway_pb2.SNAPSHOT_VERDICT_COMPLETE,
    Verdict.NO_BASE: gateway_pb2.SNAPSHOT_VERDICT_NO_BASE,
    Verdict.STALE: gateway_pb2.SNAPSHOT_VERDICT_STALE,
    Verdict.REFUSED: gateway_pb2.SNAPSHOT_VERDICT_REFUSED,
}
_VERDICT_OF = {number: verdict for verdict, number in _VERDICTS.items()}
_PLAIN_REFUSALS: dict[int, type[ExpertmeshError]] = {
    gateway_pb2.REFUSAL_REASON_DUPLICATE: DuplicateRequestError,
    gateway_pb2.REFUSAL_REASON_DRAINING: DrainingError,
    gateway_pb2.REFUSAL_REASON_ISOLATED: IsolatedError,
}
_STATS = tuple(
    name
    for name in GatewayStats.__dataclass_fields__
    if name not in {"rows_by_worker", "recoveries"}
)


def submit_message(request: Request) -> gateway_pb2.Submit:
    """Return the command that asks a gateway for a request."""
    return gateway_pb2.Submit(
        request_id=request.request_id,
        assignment=request.assignment,
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_message(request.sampling, request.num_sequences),
        stopping=inference_pb2.Stopping(
            max_tokens=request.stopping.max_tokens,
            min_tokens=request.stopping.min_tokens,
            stop_token_ids=request.stopping.stop_token_ids,
            ignore_eos=request.stopping.ignore_eos,
        ),
        eos_token_ids=request.stopping.eos_token_ids,
        output=inference_pb2.Output(
            logprobs=request.output.logprobs, prompt_logprobs=request.output.prompt_logprobs
        ),
        emitted=[inference_pb2.TokenIds(ids=ids) for ids in request.emitted],
        snapshots=[place_message(place) for place in request.snapshots],
        prefix=_prefix_message(request.prefix),
        resume_window_s=request.resume_window_s,
        was_admitted=request.was_admitted,
        deaths=request.deaths,
        cache_salt=request.cache_salt,
    )


def sampling_message(sampling: Sampling, num_sequences: int) -> inference_pb2.Sampling:
    """Return sampling with every field set."""
    return inference_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        logit_bias=dict(sampling.logit_bias),
        num_sequences=num_sequences,
    )


def request_of(message: gateway_pb2.Submit) -> Request:
    """Return the request that a command carries."""
    sampling, stopping = message.sampling, message.stopping
    return Request(
        request_id=message.request_id,
        assignment=message.assignment,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
        ),
        stopping=Stopping(
            max_tokens=stopping.max_tokens,
            min_tokens=stopping.min_tokens,
            stop_token_ids=tuple(stopping.stop_token_ids),
            eos_token_ids=tuple(message.eos_token_ids),
            ignore_eos=stopping.ignore_eos,
        ),
        output=output_of(message.output),
        num_sequences=sampling.num_sequences,
        emitted=tuple(tuple(tokens.ids) for tokens in message.emitted),
        snapshots=tuple(map(place_of, message.snapshots)),
        prefix=_prefix_of(message.prefix) if message.HasField("prefix") else None,
        resume_window_s=message.resume_window_s,
        was_admitted=message.was_admitted,
        deaths=message.deaths,
        cache_salt=message.cache_salt,
    )


def place_message(place: SnapshotPlace) -> gateway_pb2.SnapshotPlace:
    """Return where a snapshot is, as it travels."""
    return gateway_pb2.SnapshotPlace(
        sequence_index=place.sequence_index, position=place.position, holder=place.holder
    )


def place_of(message: gateway_pb2.SnapshotPlace) -> SnapshotPlace:
    """Return where a snapshot is."""
    return SnapshotPlace(message.sequence_index, message.position, message.holder)


def _prefix_message(place: PrefixPlace | None) -> gateway_pb2.PrefixPlace | None:
    if place is None:
        return None
    return gateway_pb2.PrefixPlace(num_tokens=place.num_tokens, holder=place.holder)


def _prefix_of(message: gateway_pb2.PrefixPlace) -> PrefixPlace:
    return PrefixPlace(message.num_tokens, message.holder)


def output_of(message: inference_pb2.Output) -> Output:
    """Return what is wanted beside tokens."""
    return Output(
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def event_message(event: TokenEvent) -> gateway_pb2.TokenEvent:
    """Return an event as it travels."""
    return gateway_pb2.TokenEvent(
        request_id=event.request_id,
        assignment=event.assignment,
        sequence_index=event.sequence_index,
        first_token_index=event.first_token_index,
        token_ids=event.token_ids,
        logprobs=logprob_messages(event.logprobs),
        prompt_logprobs=logprob_messages(event.prompt_logprobs),
        finish=gateway_pb2.EVENT_FINISH_UNSPECIFIED
        if event.finish is None
        else _FINISHES[event.finish],
        stop_token_id=event.stop_token_id,
        cached_tokens=event.cached_tokens,
        error=event.error,
    )


def event_of(message: gateway_pb2.TokenEvent) -> TokenEvent:
    """Return the event that travelled."""
    return TokenEvent(
        request_id=message.request_id,
        assignment=message.assignment,
        sequence_index=message.sequence_index,
        first_token_index=message.first_token_index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprob_of(entry) for entry in message.logprobs),
        prompt_logprobs=tuple(
            _logprob_of(entry) if entry.HasField("logprob") else None
            for entry in message.prompt_logprobs
        ),
        finish=_REASONS.get(message.finish),
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        cached_tokens=message.cached_tokens,
        error=message.error,
    )


def logprob_messages(
    entries: Iterable[TokenLogprob | None],
) -> list[inference_pb2.TokenLogprob]:
    """Return log-probabilities as they travel; None becomes an entry without one."""
    return [
        inference_pb2.TokenLogprob()
        if entry is None
        else inference_pb2.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[inference_pb2.TopLogprob(token_id=i, logprob=p) for i, p in entry.top],
        )
        for entry in entries
    ]


def _logprob_of(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    top = tuple((alternative.token_id, alternative.logprob) for alternative in message.top)
    return TokenLogprob(message.token_id, message.logprob, top)


def claim_message(claim: Claim) -> gateway_pb2.Claim:
    """Return a claim as a front door renews it; the session says whose it is."""
    return gateway_pb2.Claim(
        request_id=claim.request_id,
        assignment=claim.assignment,
        owner=claim.owner,
        resume_window_s=claim.resume_window_s,
        deaths=claim.deaths,
        died_at=claim.died_at,
        snapshot_holder=claim.snapshot_holder,
    )


def claim_of(message: gateway_pb2.Claim, front_door: str) -> Claim:
    """Return the claim that a front door renews or asks for."""
    return Claim(
        request_id=message.request_id,
        assignment=message.assignment,
        owner=message.owner,
        front_door=front_door,
        resume_window_s=message.resume_window_s,
        deaths=message.deaths,
        died_at=message.died_at if message.HasField("died_at") else None,
        snapshot_holder=message.snapshot_holder,
    )


def release_message(claim: Claim) -> gateway_pb2.Release:
    """Return a claim as a front door gives it up; its window is how long it is to be known."""
    return gateway_pb2.Release(
        request_id=claim.request_id,
        assignment=claim.assignment,
        keep_s=claim.resume_window_s,
        deaths=claim.deaths,
        died_at=claim.died_at,
    )


def released_of(message: gateway_pb2.Release, front_door: str) -> Claim:
    """Return the claim that a front door gives up."""
    return Claim(
        request_id=message.request_id,
        assignment=message.assignment,
        owner="",
        front_door=front_door,
        resume_window_s=message.keep_s,
        deaths=message.deaths,
        died_at=message.died_at if message.HasField("died_at") else None,
    )


def claimed_message(ticket: int, assignment: int, known: Claim | None) -> gateway_pb2.Claimed:
    """Return the directory's answer: the number that it grants, and the claim before."""
    if known is None:
        return gateway_pb2.Claimed(ticket=ticket, assignment=assignment)
    return gateway_pb2.Claimed(
        ticket=ticket,
        assignment=assignment,
        is_known=True,
        owner=known.owner,
        owner_assignment=known.assignment,
        deaths=known.deaths,
        died_at=known.died_at,
        snapshot_holder=known.snapshot_holder,
    )


def stats_message(stats: GatewayStats) -> cluster_pb2.GatewayStats:
    """Return a gateway's load and counters as they travel."""
    return cluster_pb2.GatewayStats(
        **{field: getattr(stats, field) for field in _STATS},
        rows_by_worker=stats.rows_by_worker,
        recoveries=stats.recoveries,
    )


def stats_of(message: cluster_pb2.GatewayStats) -> GatewayStats:
    """Return the load and counters that travelled."""
    return GatewayStats(
        **{field: getattr(message, field) for field in _STATS},
        rows_by_worker=dict(message.rows_by_worker),
        recoveries=tuple(message.recoveries),
    )


def prefixes_message(
    known: Mapping[int, int], kept: Mapping[int, int]
) -> gateway_pb2.Prefixes | None:
    """Return how what is kept differs from what the other end knows; None if it does not."""
    if known == kept:
        return None
    return gateway_pb2.Prefixes(
        added=[
            gateway_pb2.Prefix(digest=digest, num_tokens=num_tokens)
            for digest, num_tokens in kept.items()
            if known.get(digest) != num_tokens
        ],
        removed=list(known.keys() - kept.keys()),
    )


def update_prefixes(known: dict[int, int], message: gateway_pb2.Prefixes) -> None:
    """Apply what a gateway reports to what is known of it."""
    for digest in message.removed:
        known.pop(digest, None)
    known.update({prefix.digest: prefix.num_tokens for prefix in message.added})


def refusal_message(
    request_id: str, assignment: int, error: ExpertmeshError
) -> gateway_pb2.Refusal:
    """Return why a gateway does not take a request."""
    refusal = gateway_pb2.Refusal(request_id=request_id, assignment=assignment, message=str(error))
    match error:
        case InvalidRequestError():
            refusal.reason = gateway_pb2.REFUSAL_REASON_INVALID
            refusal.violations.extend(
                gateway_pb2.Violation(field=v.field, description=v.description)
                for v in error.violations
            )
        case DuplicateRequestError():
            refusal.reason = gateway_pb2.REFUSAL_REASON_DUPLICATE
        case OverloadedError():
            refusal.reason = gateway_pb2.REFUSAL_REASON_OVERLOADED
            refusal.retry_after_s = error.retry_after_s
        case DrainingError():
            refusal.reason = gateway_pb2.REFUSAL_REASON_DRAINING
        case StaleAssignmentError():
            refusal.reason = gateway_pb2.REFUSAL_REASON_STALE
            refusal.held_assignment = error.held
        case IsolatedError():
            refusal.reason = gateway_pb2.REFUSAL_REASON_ISOLATED
        case _:
            pass  # the gateway failed
    return refusal


def error_of(refusal: gateway_pb2.Refusal) -> ExpertmeshError:
    """Return the error that the gateway raised."""
    match refusal.reason:
        case gateway_pb2.REFUSAL_REASON_INVALID:
            return InvalidRequestError(
                *(FieldViolation(v.field, v.description) for v in refusal.violations)
            )
        case gateway_pb2.REFUSAL_REASON_OVERLOADED:
            return OverloadedError(refusal.message, refusal.retry_after_s)
        case gateway_pb2.REFUSAL_REASON_STALE:
            return StaleAssignmentError(refusal.message, refusal.held_assignment)
        case _:
            return _PLAIN_REFUSALS.get(refusal.reason, ExpertmeshError)(refusal.message)


def shard_head(shard: Shard) -> gateway_pb2.ShardHead:
    """Return what goes before the bytes of a shard."""
    stamp, data = shard.stamp, shard.data
    return gateway_pb2.ShardHead(
        owner=shard.owner,
        request_id=stamp.request_id,
        sequence_index=stamp.sequence_index,
        assignment=stamp.assignment,
        position=stamp.position,
        weights_version=stamp.weights_version,
        tokens=stamp.tokens,
        rank=data.rank,
        size=data.size,
        start=data.start,
        dtype=data.dtype,
        kv_bytes=len(data.kv),
        state_bytes=len(data.states),
        digest=data.digest(),
    )


def stamp_of(head: gateway_pb2.ShardHead) -> Stamp:
    """Return what a shard is of."""
    return Stamp(
        request_id=head.request_id,
        sequence_index=head.sequence_index,
        assignment=head.assignment,
        position=head.position,
        weights_version=head.weights_version,
        tokens=head.tokens,
    )


def shard_of(head: gateway_pb2.ShardHead, kv: bytes, states: bytes) -> Shard:
    """Return the shard that travelled; raises SnapshotError when it is not what was sent."""
    packed = PackedShard(
        rank=head.rank,
        size=head.size,
        start=head.start,
        position=head.position,
        dtype=head.dtype,
        kv=kv,
        states=states,
    )
    sizes = len(kv), len(states)
    if sizes != (head.kv_bytes, head.state_bytes) or packed.digest() != head.digest:
        raise SnapshotError(
            f"rank {head.rank}'s part of the snapshot of request {head.request_id} at "
            f"{head.position} came damaged"
        )
    return Shard(stamp=stamp_of(head), owner=head.owner, data=packed)


def verdict_message(number: int, verdict: Verdict) -> gateway_pb2.KeepAnswer:
    """Return what became of a shard, as it travels."""
    return gateway_pb2.KeepAnswer(number=number, verdict=_VERDICTS[verdict])


def verdict_of(message: gateway_pb2.KeepAnswer) -> Verdict:
    """Return what became of a shard."""
    return _VERDICT_OF.get(message.verdict, Verdict.REFUSED)


def ended_message(ended: Ended) -> gateway_pb2.SequenceEnd:
    """Return the word that a sequence has left its gateway."""
    return gateway_pb2.SequenceEnd(
        request_id=ended.request_id,
        sequence_index=ended.sequence_index,
        assignment=ended.assignment,
        has_ended=ended.has_ended,
    )
