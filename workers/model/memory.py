"""How many bytes of weights each role holds: arithmetic on the loading plan alone."""

from dataclasses import dataclass

import torch

from workers.model.config import ModelConfig
from workers.model.plan import FLOAT32_FIELDS, Layout, Piece, RankPlan, expert_plan

_LAYOUT = Layout(prefix="", fused_experts=False)  # sizes do not depend on names


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of weights by role, once loaded; caches and messages come on top.

    `rank_bytes` has one entry for each rank of a gateway, and includes all routed experts where
    there are no expert workers. `worker_slots` has one entry for each expert worker.
    """

    rank_bytes: tuple[int, ...]
    slot_bytes: int
    worker_slots: tuple[int, ...]

    @property
    def worker_bytes(self) -> tuple[int, ...]:
        """Bytes of each expert worker."""
        return tuple(slots * self.slot_bytes for slots in self.worker_slots)


def memory_plan(
    config: ModelConfig,
    *,
    tensor_parallel: int,
    num_workers: int,
    dtype: torch.dtype,
    replicas: int = 1,
    spare_slots: int = 1,
) -> MemoryPlan:
    """Compute what gateways of `tensor_parallel` ranks and `num_workers` expert workers hold.

    Experts are dealt evenly, each `replicas` times; every worker has `spare_slots` beyond them for
    coverage that is lost. Weights are held in the compute `dtype`, also those published in FP8.

    Raises ConfigError when `tensor_parallel` ranks cannot share the heads.
    """
    config.check_tensor_parallel(tensor_parallel)
    slot_bytes = expert_bytes(config, dtype)
    num_experts = config.num_layers * config.num_experts
    local_bytes = 0 if num_workers else num_experts * slot_bytes
    return MemoryPlan(
        rank_bytes=tuple(
            rank_bytes(config, rank, tensor_parallel, dtype) + local_bytes
            for rank in range(tensor_parallel)
        ),
        slot_bytes=slot_bytes,
        worker_slots=tuple(
            (num_experts * replicas + num_workers - 1 - worker) // num_workers + spare_slots
            for worker in range(num_workers)
        ),
    )


def expert_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one routed expert, which is what a slot holds."""
    plan = expert_plan(config, _LAYOUT, layer=0, expert=0)
    return sum(_elements(pieces) for pieces in plan.values()) * dtype.itemsize


def rank_bytes(config: ModelConfig, rank: int, size: int, dtype: torch.dtype) -> int:
    """Bytes of one gateway rank: everything but the routed experts, vocabulary padding included."""
    plan = RankPlan(config=config, layout=_LAYOUT, rank=rank, size=size)
    start, stop = plan.vocab_rows
    total = 0
    for field, pieces in plan.parameters():
        elements = _elements(pieces)
        if field in {"embed", "head"}:
            elements = (stop - start) * config.hidden_size
        total += elements * (torch.float32 if field in FLOAT32_FIELDS else dtype).itemsize
    return total


def _elements(pieces: tuple[Piece, ...]) -> int:
    return sum(piece.num_elements for piece in pieces)
