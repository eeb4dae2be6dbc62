"""One rank of a gateway: from its stores to its threads. A plain class; Ray wraps it at the edge.

The ranks are brought up in steps, each on all of them: `open`, `join` (together), `load`, `adopt`,
`start`. Rank 0 then runs the engine, the others follow it.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workers.clock import Clock, SystemClock
from workers.dispatch.exchange import LinkDispatcher
from workers.dispatch.options import MessageShape
from workers.dispatch.tally import LoadReport
from workers.errors import DeadlineError, DrainingError
from workers.gateway.capture import CaptureBook
from workers.gateway.clients import Clients, Sink
from workers.gateway.engine import NO_SNAPSHOTS, EngineOptions, GatewayEngine
from workers.gateway.lockstep import FailureVote, Follower, Leader, LoneVote, StoreVote, Take, drop
from workers.gateway.memory import MemoryReport, SnapshotDemand, snapshot_demand
from workers.gateway.options import GatewayOptions
from workers.gateway.outbox import Keeping, Outbox
from workers.gateway.rank import RankModel, load_rank
from workers.gateway.siblings import Siblings
from workers.gateway.snapshot import Ended, Holder, Snapshot, Stamp, Verdict, snapshot_interval
from workers.mesh import MEET_S, Rendezvous, TensorParallelGroup
from workers.model.cache import state_bytes_per_sequence
from workers.model.config import ModelConfig
from workers.model.shards import are_whole
from workers.placement import MemberId, View
from workers.types import GatewayStats, Request

IDLE_S = 0.5  # how often an idle rank 0 tells the others that it lives, and sees that they do
VOTE_S = 2.0  # how long a rank whose step failed waits to hear that all others' did
MOST_PREFIXES = 4096  # that front doors are told of
CLOSE_S = 5.0  # how long a thread may take to end


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySpec:
    """One rank of one gateway: who it is and where it runs; `host` is this node's address."""

    member: MemberId
    rank: int
    size: int
    host: str
    model_dir: str
    options: GatewayOptions


class GatewayWorker:
    """One rank of one gateway.

    `submit`, `abort`, `drain`, `turn` and what concerns snapshots are rank 0's. All calls but
    `turn` may come from any thread once `start` has returned.
    """

    def __init__(
        self, spec: GatewaySpec, *, clock: Clock | None = None, keeping: Keeping | None = None
    ) -> None:
        self._spec = spec
        self._keeping = keeping
        self._options = spec.options
        self._clock = clock or SystemClock()
        self._config = ModelConfig.load(Path(spec.model_dir))
        self._config.check_tensor_parallel(spec.size)
        self._links: LinkDispatcher | None = None
        self._store: dist.TCPStore | None = None  # of the tensor-parallel group
        self._group: TensorParallelGroup | None = None
        self._model: RankModel | None = None
        self._leader: Leader | None = None
        self._engine: GatewayEngine | None = None
        self._follower: Follower | None = None
        self._thread: threading.Thread | None = None
        self._siblings: Siblings | None = None
        self._clients = Clients()
        self._book = CaptureBook(self._interval() if keeping else 0)
        self._outbox: Outbox | None = None
        self._changed = threading.Condition()  # over the three below; also tells of new work
        self._draining = False
        self._closing = False
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why this rank has stopped for good; None while it runs."""
        return self._failure

    @property
    def ready(self) -> bool:
        """Whether this rank runs and has every expert in reach."""
        if self._thread is None or self._failure is not None:
            return False
        if self._links is not None:
            try:
                self._links.wait_ready(0.0)
            except DeadlineError:
                return False
        return True

    def open(self) -> str:
        """Start this rank's link store and return its HOST:PORT; empty with local experts."""
        torch.set_num_threads(self._options.num_threads)
        if self._options.local_experts:
            return ""
        self._links = LinkDispatcher(
            self._spec.member,
            self._spec.rank,
            shape=MessageShape(
                hidden_size=self._config.hidden_size,
                top_k=self._config.num_experts_per_token,
                dtype=self._options.compute_dtype,
            ),
            options=self._options.dispatch,
            host=self._spec.host,
            clock=self._clock,
        )
        return self._links.store_address

    def rendezvous(self) -> Rendezvous:
        """Start the store over which the ranks meet; rank 0 only."""
        assert self._spec.rank == 0
        self._store = dist.TCPStore(self._spec.host, 0, is_master=True, wait_for_workers=False)
        return Rendezvous(self._spec.host, self._store.port, f"tp/{self._spec.member}")

    def join(self, rendezvous: Rendezvous) -> None:
        """Meet the other ranks; returns on all of them once all have come."""
        spec = self._spec
        if spec.size == 1:
            self._group = TensorParallelGroup()
            return
        if self._store is None:
            timeout = timedelta(seconds=MEET_S)
            self._store = dist.TCPStore(rendezvous.host, rendezvous.port, timeout=timeout)
        self._group = TensorParallelGroup(
            spec.rank,
            spec.size,
            rendezvous,
            timeout_s=self._options.group_timeout_s,
            device=torch.device(self._options.device),
        )

    def load(self) -> MemoryReport:
        """Read this rank's weights, take its caches and build what computes.

        Raises:
            CheckpointError: The checkpoint is incomplete or damaged.
        """
        assert self._group is not None
        model_dir = Path(self._spec.model_dir)
        model = load_rank(model_dir, self._config, self._options, self._group, self._links)
        vote: FailureVote = LoneVote()
        if self._spec.size > 1:
            assert self._store is not None
            vote = StoreVote(self._store, self._spec.rank, self._spec.size, VOTE_S)
        take: Take = drop
        if self._keeping is not None:
            spec = self._spec
            self._outbox = Outbox(str(spec.member), spec.rank, spec.size, self._keeping)
            take = self._outbox.take
        if self._spec.rank == 0:
            self._leader = Leader(self._group, model.forward, model.cache, vote, take)
            self._engine = self._make_engine(self._leader)
        else:
            self._follower = Follower(self._group, model.forward, model.cache, vote, take)
        self._model = model
        return model.memory

    def adopt(self, view: View) -> None:
        """Take a newer View; older ones are ignored."""
        if self._links is not None:
            self._links.adopt(view)

    def start(self) -> None:
        """Begin to serve (rank 0) or to follow (the others), in a thread of its own."""
        body = self._lead if self._spec.rank == 0 else self._follow
        self._thread = threading.Thread(
            target=self._run, args=(body,), name="gateway-steps", daemon=True
        )
        self._thread.start()
        if self._spec.size > 1:
            assert self._store is not None
            silence_s = self._options.sibling_silence_s
            store = self._store.clone()  # type: ignore[attr-defined]  # calls on one wait in turn
            self._siblings = Siblings(store, self._spec.rank, self._spec.size, silence_s)
            self._siblings.start(self._fail)

    def submit(
        self, request: Request, sink: Sink, snapshots: Mapping[int, Snapshot] = NO_SNAPSHOTS
    ) -> None:
        """Take a request; its events go to `sink` in the engine's thread, which it must not hold.

        A sink that raises has lost its client: the request is aborted. A sequence goes on from its
        snapshot, if that is one of its tokens.

        Raises:
            InvalidRequestError: The request breaks a limit of the model or of this gateway.
            DuplicateRequestError: A request with this id is running.
            OverloadedError: Too many sequences wait.
            DrainingError: This gateway takes no new requests, or has failed.
        """
        assert self._engine is not None
        with self._changed:
            if self._draining or self._failure is not None:
                raise DrainingError(self._failure or "this gateway takes no new requests")
            self._clients.add(request, sink)  # before the engine can bring an event
            try:
                self._engine.submit(request, self._usable(request, snapshots))
            except Exception:
                self._clients.drop(request.request_id)
                raise
            self._changed.notify_all()

    def snapshot_demand(self) -> SnapshotDemand:
        """Return what a gateway like this one takes of another's store of snapshots."""
        return snapshot_demand(self._config, self._options, self._spec.size)

    def keep_with(self, holder: Holder | None, weights_version: str) -> None:
        """Hear which gateway keeps the snapshots from now on, if there is any."""
        self._book.send_to(holder, weights_version)

    def stored(self, stamp: Stamp, holder: Holder, verdict: Verdict) -> None:
        """Hear what became of rank 0's shard of a snapshot, and with it of the snapshot."""
        if verdict is Verdict.COMPLETE:
            # Kept for a while: what is whole here may be ahead of what the client has.
            ended = Ended(stamp.request_id, stamp.sequence_index, stamp.assignment, has_ended=False)
            for former in self._book.stored(stamp, holder):
                if self._keeping is not None:
                    self._keeping.release(ended, former)
        else:
            self._book.failed(stamp, holder, has_base=verdict is not Verdict.NO_BASE)

    def abort(self, request_id: str) -> None:
        """Free a request within one step; no event of it comes after this. Unknown ids are fine."""
        assert self._engine is not None
        with self._changed:
            self._clients.drop(request_id)
            self._engine.abort(request_id)
            self._changed.notify_all()

    def stats(self) -> GatewayStats:
        """Return rank 0's load and counters; of the other ranks, what their links counted."""
        stats = GatewayStats() if self._engine is None else self._with_bytes(self._engine.stats())
        if self._links is None:
            return stats
        counters: dict[str, Any] = self._links.stats()
        return replace(
            stats,
            resends=counters["resends"],
            hedges=counters["hedges"],
            parked_s=counters["parked_s"],
            dispatch_wait_s=counters["wait_s"],
            longest_deadline_s=counters["longest_deadline_s"],
            recovery_s=counters["recovery_s"],
            recoveries=counters["recoveries"],
            rows_by_worker=dict(counters["rows_by_worker"]),
        )

    def take_load(self) -> LoadReport | None:
        """Return how often this rank asked for experts since the last time."""
        return self._links.take_load() if self._links is not None else None

    def prefixes(self) -> dict[int, int]:
        """Return the digests of prefixes whose states are kept, with their numbers of tokens."""
        return {} if self._engine is None else self._engine.prefixes(MOST_PREFIXES)

    def keeps_prefix(self, digest: int) -> bool:
        """Whether the state of a prefix is kept here."""
        return self._engine is not None and self._engine.keeps_prefix(digest)

    def send_prefix(
        self, digest: int, name: str, receiver: Holder, most_bytes: int
    ) -> "Future[bool]":
        """Send a kept prefix to another gateway, as a snapshot of a request of this name.

        Returns whether it is kept, and no larger than `most_bytes`; what comes of sending it is
        told like of any snapshot.
        """
        assert self._engine is not None
        size, options = self._spec.size, self._options
        state_bytes = size * state_bytes_per_sequence(self._config, size, options.compute_dtype)
        block_bytes = size * options.kv_block_bytes(self._config, size)
        most_blocks = max(0, most_bytes - state_bytes) // block_bytes
        with self._changed:
            if self._closing or self._failure is not None:  # no step would answer
                is_kept: Future[bool] = Future()
                is_kept.set_result(False)
                return is_kept
            most_tokens = most_blocks * options.block_tokens
            is_kept = self._engine.send_prefix(digest, name, receiver, most_tokens)
            self._changed.notify_all()
        return is_kept

    def turn(self) -> None:
        """Take one step; or, with nothing to do, show the other ranks a sign of life and wait."""
        assert self._engine is not None
        assert self._leader is not None
        if self._engine.has_work:
            for request_id in self._clients.deliver(self._engine.step()):
                self._engine.abort(request_id)
            return
        self._leader.idle()
        with self._changed:
            self._changed.notify_all()  # whoever drains
            self._changed.wait_for(self._is_wanted, IDLE_S)

    def drain(self, deadline_s: float) -> bool:
        """Refuse new requests and wait for the running ones; return whether all have ended.

        Those of which another gateway holds a snapshot are told to go on there. Ranks that follow
        wait for the leader's last step, which it takes when it closes.
        """
        if self._spec.rank and self._thread is not None:
            self._thread.join(deadline_s)
            return not self._thread.is_alive()
        with self._changed:
            self._draining = True
            if self._engine is not None:
                self._engine.leave()
            self._changed.wait_for(self._is_drained, deadline_s)
            return not self._clients

    def close(self) -> None:
        """End the threads, links and stores of this rank, whatever is still running."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        if self._outbox is not None:
            self._outbox.close(CLOSE_S)
        if self._siblings is not None:
            self._siblings.stop()
        self._clients.clear()  # a step that is cut off below is no news to them
        if self._group is not None:
            self._group.close()
        if self._links is not None:
            self._links.close()
        self._store = None

    def _interval(self) -> int:
        options = self._options
        return snapshot_interval(
            options.snapshot_tokens,
            state_bytes_per_sequence(self._config, self._spec.size, options.compute_dtype),
            options.snapshot_token_bytes,
        )

    def _usable(
        self, request: Request, snapshots: Mapping[int, Snapshot]
    ) -> Mapping[int, Snapshot]:
        """Return those snapshots that are of this model and of the request's tokens."""
        emitted = request.emitted or ((),) * request.num_sequences
        return {
            index: snapshot
            for index, snapshot in snapshots.items()
            if index < len(emitted)
            and snapshot.fits(
                (*request.prompt_token_ids, *emitted[index]), self._book.weights_version
            )
            and are_whole(snapshot.shards, self._config)
        }

    def _make_engine(self, leader: Leader) -> GatewayEngine:
        return GatewayEngine(self._engine_options(), leader, self._clock, book=self._book)

    def _engine_options(self) -> EngineOptions:
        return EngineOptions(
            scheduler=self._options.scheduler_options(self._config, self._spec.size),
            vocab_size=self._config.vocab_size,
            context_tokens=self._options.context_of(self._config),
            max_waiting=self._options.max_waiting,
        )

    def _with_bytes(self, stats: GatewayStats) -> GatewayStats:
        size, options = self._spec.size, self._options
        state_bytes = state_bytes_per_sequence(self._config, size, options.compute_dtype)
        return replace(
            stats,
            prefix_kv_bytes=stats.prefix_blocks * options.kv_block_bytes(self._config, size),
            prefix_state_bytes=stats.prefix_states * state_bytes,
        )

    def _run(self, body: Callable[[], None]) -> None:
        try:
            body()
        except Exception as error:  # noqa: BLE001 - whatever it is, this rank is at its end
            assert self._group is not None
            self._fail(f"{type(error).__name__}: {error}")
            self._group.close()  # so that the other ranks notice

    def _fail(self, reason: str) -> None:
        """Be at this rank's end; whoever asks is told, and the gateway is replaced."""
        with self._changed:
            if not self._closing:
                self._failure = self._failure or reason
            self._changed.notify_all()

    def _lead(self) -> None:
        assert self._leader is not None
        while not self._closing:
            self.turn()
        self._leader.stop()

    def _follow(self) -> None:
        assert self._follower is not None
        while self._follower.follow():
            pass
        if self._siblings is not None:
            self._siblings.stop()  # rank 0 goes too

    def _is_wanted(self) -> bool:
        assert self._engine is not None
        return self._closing or self._engine.has_work

    def _is_drained(self) -> bool:
        return not self._clients or self._failure is not None
