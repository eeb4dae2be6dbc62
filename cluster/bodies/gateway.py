"""The body of one gateway rank."""

import os
from dataclasses import replace

import structlog

from cluster.bodies.process import LoopThread, Process, own_port
from cluster.config import ClusterConfig
from cluster.control.ports import Opened, Pulse
from cluster.endpoint import EndpointOptions, GatewayEndpoint
from cluster.prefixes import PrefixSender, PrefixSource
from cluster.runtime.nodes import node_address, node_name
from cluster.snapshot_lines import Line, SnapshotKeeper, SnapshotSender
from cluster.snapshots import SnapshotClient, SnapshotServicer, SnapshotSource
from cluster.telemetry import GATEWAY_SAMPLES, StatsCollector
from workers.clock import SystemClock
from workers.dispatch.options import DispatchOptions, Transport
from workers.gateway.buddy import choose_buddy
from workers.gateway.memory import store_shortage
from workers.gateway.options import GatewayOptions
from workers.gateway.outbox import Keeping
from workers.gateway.snapshot import Holder, Stamp, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.gateway.worker import GatewaySpec, GatewayWorker
from workers.mesh import Rendezvous
from workers.placement import MemberId, Role, View
from workers.types import GatewayStats

CONNECT_S = 10.0

_log = structlog.get_logger()


class GatewayBody(Process):
    """One rank of a gateway; rank 0 also serves the stream to the front doors."""

    def __init__(
        self, member: MemberId, rank: int, model_dir: str, host: str, config: ClusterConfig
    ) -> None:
        port = own_port(config.telemetry.metrics_port, host, rank)
        super().__init__(Role.GATEWAY, member, config.telemetry, metrics_port=port)
        self._member = member
        self._rank = rank
        self._drain_s = config.gateways.drain_s
        self._endpoint_options = EndpointOptions(
            max_window_s=config.gateways.max_resume_window_s,
            max_deaths=config.gateways.max_deaths,
        )
        self._host = host or node_address()
        self._loop = LoopThread()
        self._client = SnapshotClient()
        self._sender = SnapshotSender(rank, self._connect, self._told, SystemClock())
        self._keeper: SnapshotKeeper | None = None
        options = gateway_options(config)
        self._worker = GatewayWorker(
            GatewaySpec(
                member=member,
                rank=rank,
                size=config.gateways.tensor_parallel,
                host=self._host,
                model_dir=model_dir,
                options=options,
            ),
            keeping=Keeping(self._sender.push, self._sender.release, self._failed),
        )
        self._endpoint: GatewayEndpoint | None = None
        store_bytes = config.gateways.snapshot_store_bytes
        self._store = SnapshotStore(store_bytes, SystemClock())
        self._shortage = store_shortage(self._worker.snapshot_demand(), options, store_bytes)
        prefixes = PrefixSource(str(member), self._worker, self._store, self._client, SystemClock())
        self._source = SnapshotSource(str(member), self._store, self._client, prefixes)
        self._prefixes = PrefixSender(self._worker)
        if rank == 0:
            self.registry.register(StatsCollector(self._stats, GATEWAY_SAMPLES, str(member)))

    def open(self) -> Opened:
        """Start this rank's stores."""
        store = self._worker.open()
        rendezvous = self._worker.rendezvous() if self._rank == 0 else None
        return self.opened(store=store, rendezvous=rendezvous)

    def join(self, rendezvous: Rendezvous) -> None:
        """Meet the other ranks of the gateway."""
        self._worker.join(rendezvous)

    def load(self) -> None:
        """Read this rank's weights and take its memory."""
        self._worker.load()

    def start(self) -> Opened | None:
        """Run the engine; rank 0 begins to listen to front doors."""
        self._worker.start()
        if self._rank:
            return None
        endpoint = self._loop.run(self._listen(), timeout_s=30.0)
        return Opened(pid=os.getpid(), node=node_name(), endpoint=endpoint)

    def adopt(self, view: View) -> None:
        """Take a newer View."""
        self._worker.adopt(view)
        if view.order > self.order:
            gateways = view.with_role(Role.GATEWAY)
            self._source.endpoints = {str(m.id): m.endpoint for m in gateways if m.endpoint}
            endpoints = set(self._source.endpoints.values())
            self._sender.let_go(endpoints)
            self._loop.begin(self._client.let_go(endpoints))
            if self._rank == 0:
                buddy = choose_buddy(view, self._member)
                self._worker.keep_with(buddy, view.placement.weights_version)
                if buddy is not None and self._shortage:  # where there is one, it keeps for others
                    _log.warning("the store of snapshots is small", why=self._shortage)
                    self._shortage = ""
        self.note(view)

    def pulse(self) -> Pulse:
        """Say how this rank is."""
        if self._rank == 0:
            self._store.sweep(self._source.endpoints)
        return Pulse(
            order=self.order,
            ready=self._worker.ready,
            failure=self._worker.failure or "",
            stats=self._stats() if self._rank == 0 else None,
            load=self._worker.take_load(),
        )

    def drain(self) -> bool:
        """Hand the running sequences over or finish them, then close."""
        idle = self._worker.drain(self._drain_s)
        if self._keeper is not None:
            self._keeper.close()  # with the endpoint, where what it keeps is fetched
        try:
            if self._endpoint is not None:
                self._loop.run(self._endpoint.close(), timeout_s=10.0)
        finally:
            self._worker.close()
            self._sender.close()
        return idle

    async def _listen(self) -> str:
        self._keeper = SnapshotKeeper(self._store, self._host, SystemClock())
        self._endpoint = GatewayEndpoint(
            self._worker,
            f"{self._host}:0",
            self._endpoint_options,
            keeper=SnapshotServicer(self._store, self._keeper, self._prefixes, self._source.holder),
            source=self._source,
        )
        return await self._endpoint.start()

    def _stats(self) -> GatewayStats:
        return replace(
            self._worker.stats(),
            snapshot_bytes=self._store.num_bytes,
            snapshots_evicted=self._store.num_evicted,
        )

    def _connect(self, holder: Holder) -> Line:
        place = self._loop.run(self._client.place(holder), timeout_s=CONNECT_S)
        return Line.open(*place)

    def _failed(self, stamp: Stamp, holder: Holder) -> None:
        self._told(stamp, holder, Verdict.REFUSED)

    def _told(self, stamp: Stamp, holder: Holder, verdict: Verdict) -> None:
        """Hear what became of a part that was sent."""
        if self._rank:
            return  # rank 0 hears when all parts are there
        if self._prefixes.sends(stamp.request_id):
            self._loop.soon(self._prefixes.told, stamp.request_id, verdict)
            return
        if verdict is Verdict.COMPLETE and self._endpoint is not None:
            # The loop hears of it before it hears that the sequence moves.
            self._loop.soon(self._endpoint.report, stamp, holder.member)
        self._worker.stored(stamp, holder, verdict)


def gateway_options(config: ClusterConfig) -> GatewayOptions:
    """Translate the configuration into the gateway's own words."""
    section = config.gateways
    local = config.experts.workers == 0
    device = "cuda" if section.num_gpus else "cpu"
    return GatewayOptions(
        max_sequences=section.max_sequences,
        max_waiting=section.max_waiting,
        step_tokens=section.step_tokens,
        block_tokens=section.block_tokens,
        num_kv_blocks=section.kv_blocks,
        context_tokens=section.context_tokens,
        local_experts=local,
        micro_batches=section.micro_batches or (2 if section.num_gpus and not local else 1),
        bit_stable=config.dispatch.bit_stable,
        dtype=config.compute_dtype,
        num_threads=section.threads,
        snapshot_tokens=section.snapshot_tokens,
        snapshot_token_bytes=section.snapshot_token_bytes,
        sibling_silence_s=section.sibling_silence_s,
        prefix_cache=section.prefix_cache,
        prefix_kv_bytes=section.prefix_kv_bytes,
        prefix_state_bytes=section.prefix_state_bytes,
        prefix_states_on_host=section.prefix_states_on_host,
        device=device,
        dispatch=DispatchOptions(
            transport=Transport(config.dispatch.transport),
            device=device,
            bit_stable=config.dispatch.bit_stable,
            capacity_rows=config.dispatch.capacity_rows,
            first_deadline_s=config.dispatch.first_deadline_s,
        ),
    )
