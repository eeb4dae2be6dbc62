"""The body of an expert worker."""

from collections.abc import Mapping
from pathlib import Path

from cluster.bodies.process import Process, own_port
from cluster.config import ClusterConfig
from cluster.control.ports import Opened, Pulse
from cluster.runtime.nodes import node_address, node_pool
from cluster.telemetry import WORKER_SAMPLES, StatsCollector
from workers.clock import SystemClock
from workers.expert.probe import Fingerprint
from workers.expert.worker import ExpertWorker, WorkerOptions
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.placement import ExpertId, MemberId, Role, View


class ExpertWorkerBody(Process):
    """One expert worker."""

    def __init__(
        self,
        member: MemberId,
        model_dir: str,
        num_slots: int,
        host: str,
        config: ClusterConfig,
    ) -> None:
        port = own_port(config.telemetry.metrics_port, host)
        super().__init__(Role.EXPERT_WORKER, member, config.telemetry, metrics_port=port)
        directory = Path(model_dir)
        self._num_slots = config.experts.pool_slots.get(node_pool(), num_slots)
        self._worker = ExpertWorker(
            member,
            config=ModelConfig.load(directory),
            checkpoint=Checkpoint(directory),
            num_slots=self._num_slots,
            options=WorkerOptions(
                bit_stable=config.dispatch.bit_stable,
                capacity_rows=config.dispatch.capacity_rows,
                num_threads=config.experts.threads,
                device="cuda" if config.experts.num_gpus else "cpu",
                dtype=config.compute_dtype,
            ),
            host=host or node_address(),
            clock=SystemClock(),
        )
        self.registry.register(StatsCollector(self._worker.stats, WORKER_SAMPLES, str(member)))

    def open(self) -> Opened:
        """Say where this worker runs, and how many slots it has there."""
        return self.opened(num_slots=self._num_slots)

    def load(self, assignment: Mapping[ExpertId, int]) -> dict[ExpertId, Fingerprint]:
        """Read the weights of the assigned experts into their slots; returns what each computes."""
        return self._worker.load(assignment)

    def start(self) -> None:
        """Answer calls."""
        self._worker.start()

    def adopt(self, view: View) -> None:
        """Take a newer View: links to its gateways are opened in the background."""
        self._worker.adopt(view)
        self.note(view)

    def pulse(self) -> Pulse:
        """Say how this worker is."""
        return Pulse(
            order=self.order,
            ready=True,
            failure=self._worker.failure or "",
            stats=self._worker.stats(),
        )

    def drain(self, deadline_s: float = 10.0) -> None:
        """Answer what has arrived, then close."""
        self._worker.drain(deadline_s)
        self._worker.close()
