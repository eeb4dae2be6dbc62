"""Logs and metrics of every role: names, units and labels in one place.

Every process logs JSON lines to standard error and serves its Prometheus page on a port of its own.
Counters of the data plane are read from its statistics when the page is asked for; nothing is
pushed.
"""

import errno
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from structlog.typing import EventDict

from workers.types import RECOVERY_BOUNDS_S, GatewayStats, WorkerStats

_LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
_COUNT = CounterMetricFamily
_GAUGE = GaugeMetricFamily


@dataclass(frozen=True, slots=True)
class Sample:
    """One exported series of a statistics field: its name, kind and meaning."""

    field: str
    name: str
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    help: str


GATEWAY_SAMPLES = (
    Sample("running", "expertmesh_gateway_running_sequences", _GAUGE, "Sequences in the batch."),
    Sample("waiting", "expertmesh_gateway_waiting_sequences", _GAUGE, "Sequences that wait."),
    Sample("kv_blocks_used", "expertmesh_gateway_kv_blocks_used", _GAUGE, "KV blocks in use."),
    Sample("kv_blocks_total", "expertmesh_gateway_kv_blocks", _GAUGE, "KV blocks in all."),
    Sample(
        "state_blocks_used", "expertmesh_gateway_state_blocks_used", _GAUGE, "State blocks in use."
    ),
    Sample("state_blocks_total", "expertmesh_gateway_state_blocks", _GAUGE, "State blocks in all."),
    Sample("steps", "expertmesh_gateway_steps", _COUNT, "Steps that were committed."),
    Sample("tokens_generated", "expertmesh_gateway_generated_tokens", _COUNT, "Tokens sampled."),
    Sample(
        "tokens_prefilled", "expertmesh_gateway_prefilled_tokens", _COUNT, "Prompt tokens computed."
    ),
    Sample(
        "preemptions",
        "expertmesh_gateway_preemptions",
        _COUNT,
        "Sequences put back for want of blocks.",
    ),
    Sample("resends", "expertmesh_gateway_resends", _COUNT, "Expert calls sent again."),
    Sample("hedges", "expertmesh_gateway_hedges", _COUNT, "Expert calls sent twice on suspicion."),
    Sample(
        "longest_deadline_s",
        "expertmesh_gateway_longest_deadline_seconds",
        _GAUGE,
        "The longest deadline of a call that an expert worker has missed.",
    ),
    Sample(
        "parked_s",
        "expertmesh_gateway_parked_seconds",
        _COUNT,
        "Time with rows that no worker could serve.",
    ),
    Sample(
        "dispatch_wait_s",
        "expertmesh_gateway_dispatch_wait_seconds",
        _COUNT,
        "Time spent waiting for experts.",
    ),
    Sample("step_s", "expertmesh_gateway_step_seconds", _COUNT, "Time spent in steps."),
    Sample(
        "snapshots_stored",
        "expertmesh_gateway_snapshots_stored",
        _COUNT,
        "Snapshots of its sequences that another gateway holds or held.",
    ),
    Sample(
        "snapshots_skipped",
        "expertmesh_gateway_snapshots_skipped",
        _COUNT,
        "Intervals of completion tokens without a snapshot, since one was on its way still.",
    ),
    Sample(
        "snapshots_evicted",
        "expertmesh_gateway_snapshots_evicted",
        _COUNT,
        "How often a running sequence's snapshots had to go, or were not taken, for want of room.",
    ),
    Sample(
        "snapshot_bytes",
        "expertmesh_gateway_snapshot_bytes",
        _GAUGE,
        "Bytes of snapshots that are kept for other gateways.",
    ),
    Sample(
        "restores",
        "expertmesh_gateway_restores",
        _COUNT,
        "Sequences that went on here from a snapshot.",
    ),
    Sample(
        "recomputes",
        "expertmesh_gateway_recomputes",
        _COUNT,
        "Sequences that went on here from the prompt.",
    ),
    Sample(
        "replayed_tokens",
        "expertmesh_gateway_replayed_tokens",
        _COUNT,
        "Known tokens computed again behind a snapshot.",
    ),
    Sample(
        "recomputed_tokens",
        "expertmesh_gateway_recomputed_tokens",
        _COUNT,
        "Known tokens computed again from the prompt on.",
    ),
    Sample(
        "moved",
        "expertmesh_gateway_moved_sequences",
        _COUNT,
        "Sequences that went on elsewhere while it drained.",
    ),
    Sample("prefix_lookups", "expertmesh_prefix_lookups", _COUNT, "Sequences that were admitted."),
    Sample("prefix_hits", "expertmesh_prefix_hits", _COUNT, "Those that began from a kept state."),
    Sample(
        "prefix_hit_tokens", "expertmesh_prefix_hit_tokens", _COUNT, "Tokens not computed again."
    ),
    Sample("prefix_blocks", "expertmesh_prefix_blocks", _GAUGE, "KV blocks kept, held or not."),
    Sample("prefix_states", "expertmesh_prefix_states", _GAUGE, "Recurrent states kept."),
    Sample(
        "prefix_kv_bytes", "expertmesh_prefix_kv_bytes", _GAUGE, "KV blocks kept, on each rank."
    ),
    Sample(
        "prefix_state_bytes", "expertmesh_prefix_state_bytes", _GAUGE, "States kept, on each rank."
    ),
    Sample(
        "prefix_block_evictions",
        "expertmesh_prefix_block_evictions",
        _COUNT,
        "Kept KV blocks that were dropped.",
    ),
    Sample(
        "prefix_state_evictions",
        "expertmesh_prefix_state_evictions",
        _COUNT,
        "Kept states that made way for others.",
    ),
    Sample(
        "prefix_fetches",
        "expertmesh_prefix_fetches",
        _COUNT,
        "Sequences that began with what another gateway had kept.",
    ),
    Sample(
        "prefix_fetched_tokens",
        "expertmesh_prefix_fetched_tokens",
        _COUNT,
        "Tokens that were fetched instead of computed.",
    ),
)
WORKER_SAMPLES = (
    Sample("slots_used", "expertmesh_worker_slots_used", _GAUGE, "Slots that hold an expert."),
    Sample("slots_total", "expertmesh_worker_slots", _GAUGE, "Slots in all."),
    Sample("links", "expertmesh_worker_links", _GAUGE, "Open links to gateway ranks."),
    Sample("calls", "expertmesh_worker_calls", _COUNT, "Calls answered."),
    Sample("rows", "expertmesh_worker_rows", _COUNT, "Token rows received."),
    Sample("pairs", "expertmesh_worker_pairs", _COUNT, "(row, expert) pairs computed."),
    Sample(
        "stale_answers",
        "expertmesh_worker_stale_answers",
        _COUNT,
        "Calls for experts that it does not hold.",
    ),
    Sample(
        "queue_age_s",
        "expertmesh_worker_queue_age_seconds",
        _GAUGE,
        "Age of the oldest call that waits.",
    ),
    Sample("compute_s", "expertmesh_worker_compute_seconds", _COUNT, "Time spent computing."),
    Sample(
        "batches",
        "expertmesh_worker_batches",
        _COUNT,
        "Batches computed; a batch takes all calls that wait.",
    ),
)
ROWS_BY_WORKER = "expertmesh_gateway_rows"
RECOVERY = "expertmesh_gateway_recovery_seconds"
VIEW_VERSION = "expertmesh_view_version"
VIEW_TERM = "expertmesh_view_term"
UNCOVERED = "expertmesh_uncovered_experts"


class StatsCollector(Collector):
    """Exports a statistics object, read anew for each scrape."""

    def __init__(
        self,
        read: Callable[[], GatewayStats | WorkerStats],
        samples: tuple[Sample, ...],
        member: str,
    ) -> None:
        self._read = read
        self._samples = samples
        self._member = member

    def collect(self) -> Iterator[Metric]:
        """Yield one family a field, and the rows sent to each worker."""
        stats = self._read()
        for sample in self._samples:
            family = sample.kind(sample.name, sample.help, labels=["member"])
            family.add_metric([self._member], float(getattr(stats, sample.field)))
            yield family
        if isinstance(stats, GatewayStats):
            rows = CounterMetricFamily(
                ROWS_BY_WORKER, "Token rows sent, by worker.", labels=["member", "worker"]
            )
            for worker, count in sorted(stats.rows_by_worker.items()):
                rows.add_metric([self._member, worker], float(count))
            yield rows
            yield self._recoveries(stats)

    def _recoveries(self, stats: GatewayStats) -> Metric:
        family = HistogramMetricFamily(
            RECOVERY, "From a noticed loss of rows to the end of their layer.", labels=["member"]
        )
        counts = stats.recoveries or (0,) * (len(RECOVERY_BOUNDS_S) + 1)
        bounds = [*map(str, RECOVERY_BOUNDS_S), "+Inf"]
        up_to = itertools.accumulate(map(float, counts))
        buckets = list(zip(bounds, up_to, strict=True))
        family.add_metric([self._member], buckets, stats.recovery_s)
        return family


class ViewGauges:
    """The View that a process has adopted."""

    def __init__(self, registry: CollectorRegistry, member: str) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["member"], registry=registry).labels(member)

        self._version = gauge(VIEW_VERSION, "Version of the adopted View.")
        self._term = gauge(VIEW_TERM, "Term of the adopted View.")
        self._uncovered = gauge(UNCOVERED, "Experts without a serving replica in the adopted View.")

    def set(self, term: int, version: int, num_uncovered: int) -> None:
        """Note a newly adopted View."""
        self._term.set(term)
        self._version.set(version)
        self._uncovered.set(num_uncovered)


class FrontDoorInstruments:
    """What the front door counts and times; fits `cluster.frontdoor.metrics.FrontDoorMetrics`."""

    def __init__(self, registry: CollectorRegistry, member: str) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["member", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["member"], registry=registry).labels(member)

        def latency(name: str, text: str) -> Histogram:
            return Histogram(
                name, text, ["member"], buckets=_LATENCY_BUCKETS_S, registry=registry
            ).labels(member)

        self._member = member
        self._requests = counter(
            "expertmesh_requests", "Calls that ended, by method and gRPC status.", "method", "code"
        )
        self._prompt_tokens = counter(
            "expertmesh_prompt_tokens", "Prompt tokens of admitted requests."
        ).labels(member)
        self._completion_tokens = counter(
            "expertmesh_completion_tokens", "Tokens delivered to clients."
        ).labels(member)
        self._first_token_s = latency(
            "expertmesh_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._token_gap_s = latency(
            "expertmesh_token_gap_seconds", "Between two deliveries of tokens of one sequence."
        )
        self._in_flight = gauge("expertmesh_requests_in_flight", "Requests admitted and not ended.")
        self._waiting = gauge(
            "expertmesh_requests_waiting", "Requests admitted and without a token yet."
        )

    def load_changed(self, in_flight: int, waiting: int) -> None:
        """Note the requests in flight, and those of them without a token."""
        self._in_flight.set(in_flight)
        self._waiting.set(waiting)

    def request_admitted(self, prompt_tokens: int) -> None:
        """Note a request that passed admission."""
        self._prompt_tokens.inc(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        """Note the time from a request's arrival to its first token."""
        self._first_token_s.observe(seconds)

    def tokens(self, count: int, gap_s: float | None) -> None:
        """Note delivered tokens, and the time since those before."""
        self._completion_tokens.inc(count)
        if gap_s is not None:
            self._token_gap_s.observe(gap_s)

    def request_ended(self, method: str, code: str) -> None:
        """Note the end of a call."""
        self._requests.labels(self._member, method, code).inc()


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> str:
    """Serve the registry at /metrics and return HOST:PORT; port 0 takes a free one.

    So does a port that is taken: a successor may start while its predecessor still drains.
    """
    try:
        server, _thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not port:
            raise
        server, _thread = start_http_server(0, addr=host, registry=registry)
    return f"{host}:{server.server_port}"


def configure_logging(role: str, member: str, level: str) -> None:
    """Log JSON lines to standard error, each with its role and member."""

    def of_this_process(_logger: object, _method: str, event: EventDict) -> EventDict:
        return {"role": role, "member": member, **event}

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            of_this_process,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
