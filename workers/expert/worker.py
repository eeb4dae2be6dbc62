"""The expert worker: answers calls of any number of gateways, computing together what waits.

A thread per link receives and queues. Whoever then finds nobody computing computes: the thread
that received the call, at once and without handing it over, when the worker is idle; else the
compute thread, for all that came meanwhile. So there is one computation at a time over everything
that waits but suspects (`dispatch/suspects`), which are computed one by one, and a lone call pays
for no extra thread switch. Nothing waits for a gateway but what comes after a suspect, and that not
for long.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from workers.clock import Clock
from workers.dispatch.header import OLDEST_VERSION, VERSION, Status
from workers.dispatch.options import LinkTerms
from workers.dispatch.rendezvous import LinkOpener
from workers.errors import LinkClosedError, PlacementError
from workers.expert.batching import OTHERS_SETTLE_S, CallQueue, into_batches
from workers.expert.compute import Answer, compute_batch
from workers.expert.followers import Followers
from workers.expert.probe import Fingerprint, Probe
from workers.expert.served_link import Call
from workers.expert.slots import SlotTable
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.model.experts import ExpertShard
from workers.model.layers import ROW_TILE
from workers.model.weights import load_expert
from workers.placement import ExpertId, MemberId, View
from workers.types import WorkerStats

_IDLE_TURN_S = 1.0
_QUIET_S = 0.2  # a draining worker is idle when no call has come for so long

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What the operator may set about an expert worker.

    `capacity_rows` is the longest message that it accepts; `num_threads` 0 leaves torch's choice.
    """

    bit_stable: bool = False
    capacity_rows: int = 512
    num_threads: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    connect_timeout_s: float = 10.0
    lease_timeout_s: float = 30.0


class ExpertWorker:
    """One expert worker: slots with weights, links to gateways, one computation at a time."""

    def __init__(
        self,
        member: MemberId,
        *,
        config: ModelConfig,
        checkpoint: Checkpoint,
        num_slots: int,
        options: WorkerOptions,
        host: str,
        clock: Clock,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._options = options
        self._clock = clock
        self._device = torch.device(options.device)
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._shard = ExpertShard(
            num_slots,
            config.hidden_size,
            config.moe_intermediate_size,
            dtype=self._dtype,
            device=self._device,
            row_tile=ROW_TILE if options.bit_stable else None,
        )
        self._slots = SlotTable(
            num_slots=num_slots,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            clock=clock,
        )
        self._queue: CallQueue[Call] = CallQueue()
        self._computing = threading.Lock()
        self._loading = threading.Lock()
        self._waiting = threading.Event()
        self._started = self._closed = self._draining = False
        self._last_call_s = clock.now_s()
        self._counts = dict.fromkeys(("calls", "rows", "pairs", "stale_answers", "batches"), 0)
        self._compute_s = 0.0
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)
        self._followers = Followers(
            member,
            opener=LinkOpener(host, options.device, options.connect_timeout_s, clock),
            refuse=self._refuse,
            deliver=self._deliver,
            on_settled=self._waiting.set,
            num_layers=config.num_layers,
            clock=clock,
        )

    def load(self, assignment: Mapping[ExpertId, int]) -> dict[ExpertId, Fingerprint]:
        """Bring the named slots to the named experts, while calls go on; others stay as they are.

        Returns, for each expert that was read, what it makes of a fixed row: replicas compare. One
        call at a time: a controller may come back while its predecessor's load goes on.

        Raises PlacementError, before anything is changed, when an expert or a slot does not exist,
        and CheckpointError when an expert cannot be read or does not compute what it should.
        """
        self._check(assignment)
        with self._loading:
            held = self._slots.held()
            return {
                expert: self._load_one(expert, slot)
                for expert, slot in sorted(assignment.items(), key=lambda item: item[1])
                if held.get(expert) != slot
            }

    def unload(self, slots: Mapping[ExpertId, int]) -> None:
        """Take experts out of use: rows for them are answered STALE from now on."""
        held = self._slots.held()
        for expert, slot in slots.items():
            if held.get(expert) == slot:
                self._slots.unmap(slot, self._options.lease_timeout_s)

    def held(self) -> Mapping[ExpertId, int]:
        """Return the slot of every expert in use."""
        return self._slots.held()

    def adopt(self, view: View) -> None:
        """Take a View if it is newer: links to its gateways open in the background."""
        self._followers.adopt(view)

    def start(self) -> None:
        """Begin to compute; calls that came before wait until then."""
        if self._options.num_threads:
            torch.set_num_threads(self._options.num_threads)
        self._started = True
        self._thread.start()
        self._waiting.set()

    def stats(self) -> WorkerStats:
        """Return the worker's load and counters."""
        oldest = self._queue.oldest()
        return WorkerStats(
            slots_used=len(self._slots.held()),
            slots_total=self._slots.num_slots,
            links=self._followers.num_links,
            queue_age_s=self._clock.now_s() - oldest.arrived_s if oldest else 0.0,
            compute_s=self._compute_s,
            **self._counts,
        )

    def drain(self, deadline_s: float) -> bool:
        """Tell gateways to prefer others, and go on serving until no more calls come.

        Returns whether the worker fell idle within `deadline_s`.
        """
        self._draining = True
        started_s = self._clock.now_s()
        pause = threading.Event()
        while (
            self._queue
            or self._computing.locked()
            or self._clock.now_s() - max(started_s, self._last_call_s) < _QUIET_S
        ):
            if self._clock.now_s() >= started_s + deadline_s:
                return False
            pause.wait(_QUIET_S / 10)
        return True

    def close(self) -> None:
        """Close all links and stop; calls that wait are not answered."""
        self._closed = True
        self._waiting.set()
        self._followers.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_IDLE_TURN_S)

    def _refuse(self, terms: LinkTerms) -> str:
        """Say why a link's terms cannot be accepted; "" when they can."""
        if not OLDEST_VERSION <= terms.version <= VERSION:
            return f"version {terms.version}, spoken here {OLDEST_VERSION} to {VERSION}"
        ours = (self._config.hidden_size, self._config.num_experts_per_token, self._options.dtype)
        theirs = (terms.hidden_size, terms.top_k, terms.dtype)
        if theirs != ours:
            return f"rows (hidden size, top k, dtype) are {theirs}, here {ours}"
        if terms.capacity_rows > self._options.capacity_rows:
            return f"capacity_rows {terms.capacity_rows}, here {self._options.capacity_rows}"
        return ""

    def _deliver(self, call: Call) -> None:
        """Queue a call, in its link's thread, and compute it here if nobody is computing."""
        self._last_call_s = call.arrived_s
        self._queue.put(call)
        if not self._started or not self._computing.acquire(blocking=False):
            return  # whoever is computing looks at the queue once more when done
        try:
            self._compute()
        finally:
            self._computing.release()
        if self._queue:
            self._waiting.set()

    def _run(self) -> None:
        """Body of the compute thread: takes over when calls came during a computation."""
        with torch.inference_mode():
            while not self._closed:
                self._waiting.wait(OTHERS_SETTLE_S if self._queue else _IDLE_TURN_S)
                self._waiting.clear()
                while self._queue.has_next(self._clock.now_s()) and not self._closed:
                    with self._computing:
                        self._compute()

    def _compute(self) -> None:
        """Compute and answer what is next of what waits; the caller holds `_computing`."""
        calls = self._queue.take(self._clock.now_s())
        if not calls:
            return
        started_s = self._clock.now_s()
        lease = self._slots.lease()
        try:
            for calls_of_layer in into_batches(calls):
                if calls_of_layer[0].is_alone:
                    self._say_begun(calls_of_layer[0])
                slot_F = lease.slots_LF[calls_of_layer[0].header.layer]
                batch = compute_batch(calls_of_layer, self._shard, slot_F, self._device)
                self._counts["batches"] += 1
                self._counts["pairs"] += batch.num_pairs
                for answer in batch.answers:
                    self._send(answer)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            log.exception("the worker fails: its calls go to other replicas")
            self._fail()
        finally:
            self._slots.give_back(lease)
        self._compute_s += self._clock.now_s() - started_s

    def _say_begun(self, call: Call) -> None:
        if self._device.type == "cuda":  # what was computed before may still fail
            torch.cuda.synchronize(self._device)
        try:
            call.served.say_begun(call.header)
        except LinkClosedError as error:
            log.info("%s rank %d is gone: %s", call.served.gateway, call.served.rank, error)

    def _send(self, answer: Answer) -> None:
        call, frame, header = answer
        served = call.served
        self._counts["calls"] += 1
        self._counts["rows"] += call.header.num_rows
        self._counts["stale_answers"] += answer.is_stale
        if self._draining or self._queue:
            status = Status.DRAINING if self._draining else Status.OK
            header = header._replace(status=status, queue_depth=min(len(self._queue), 65535))
        served.release(call.frame)
        try:
            served.link.send(frame, header)
        except LinkClosedError as error:
            log.info("no answer to %s rank %d: %s", served.gateway, served.rank, error)

    def _fail(self) -> None:
        """Close the links, so that gateways send what waits here to other replicas."""
        self._closed = True
        threading.Thread(target=self._followers.close, name="closing", daemon=True).start()

    def _check(self, assignment: Mapping[ExpertId, int]) -> None:
        config, num_slots = self._config, self._slots.num_slots
        for expert, slot in assignment.items():
            if not (
                0 <= expert.layer < config.num_layers and 0 <= expert.expert < config.num_experts
            ):
                raise PlacementError(f"{expert} does not exist in this model")
            if not 0 <= slot < num_slots:
                raise PlacementError(f"slot {slot} of {num_slots} for {expert}")
        if len(set(assignment.values())) < len(assignment):
            raise PlacementError("two experts are assigned to one slot")

    def _load_one(self, expert: ExpertId, slot: int) -> Fingerprint:
        parameters = load_expert(
            self._checkpoint,
            self._config,
            expert.layer,
            expert.expert,
            dtype=self._dtype,
            device=self._device,
        )
        probe = Probe(self._config, expert, self._dtype, self._device)
        self._slots.overwrite(
            slot,
            expert,
            write=lambda: self._shard.write(slot, parameters),
            verify=lambda: probe.agrees(self._shard, slot, parameters),
            timeout_s=self._options.lease_timeout_s,
        )
        return probe.fingerprint
