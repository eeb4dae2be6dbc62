"""What one rank computes with: its weights, its caches and the decoder over both."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from workers.dispatch.base import Dispatcher
from workers.dispatch.local import LocalDispatcher
from workers.gateway.lockstep import Forward
from workers.gateway.memory import MemoryReport, rank_memory
from workers.gateway.options import GatewayOptions
from workers.mesh import TensorParallelGroup
from workers.model.cache import SequenceCache
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.model.decoder import Decoder, DecoderOptions
from workers.model.experts import ExpertShard
from workers.model.gate import GateProbe
from workers.model.kernels import choose_kernels
from workers.model.layers import ROW_TILE
from workers.model.weights import load_decoder, load_expert
from workers.placement import ExpertId


@dataclass(frozen=True, slots=True, kw_only=True)
class RankModel:
    """A rank that can compute."""

    decoder: Decoder
    cache: SequenceCache
    dispatcher: Dispatcher
    memory: MemoryReport

    @property
    def forward(self) -> Forward:
        """Run one batch over this rank's cache."""
        return partial(self.decoder.forward, cache=self.cache)


def load_rank(
    model_dir: Path,
    config: ModelConfig,
    options: GatewayOptions,
    group: TensorParallelGroup,
    dispatcher: Dispatcher | None = None,
    *,
    probe: GateProbe | None = None,
) -> RankModel:
    """Read a rank's weights and take its caches; without a dispatcher, all routed experts too.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    options = replace(options, local_experts=dispatcher is None)
    device, dtype = torch.device(options.device), options.compute_dtype
    with Checkpoint(model_dir) as checkpoint:
        parameters = load_decoder(
            checkpoint, config, rank=group.rank, size=group.size, dtype=dtype, device=device
        )
        if dispatcher is None:
            dispatcher = load_local_experts(checkpoint, config, options)
    decoder = Decoder(
        config,
        parameters,
        group,
        dispatcher,
        kernels=choose_kernels(device),
        options=DecoderOptions(bit_stable=options.bit_stable, micro_batches=options.micro_batches),
        probe=probe,
    )
    limits = options.scheduler_options(config, group.size)
    cache = SequenceCache(
        config,
        num_kv_blocks=limits.num_kv_blocks,
        block_tokens=options.block_tokens,
        num_state_blocks=options.max_sequences,
        num_checkpoints=limits.prefix.num_places,
        checkpoint_device=torch.device("cpu") if options.prefix_states_on_host else device,
        tp_size=group.size,
        rank=group.rank,
        dtype=dtype,
        device=device,
    )
    memory = rank_memory(config, options, rank=group.rank, size=group.size)
    return RankModel(decoder=decoder, cache=cache, dispatcher=dispatcher, memory=memory)


def load_local_experts(
    checkpoint: Checkpoint, config: ModelConfig, options: GatewayOptions
) -> LocalDispatcher:
    """Read every routed expert into this process."""
    device, dtype = torch.device(options.device), options.compute_dtype
    ids = [
        ExpertId(layer, expert)
        for layer in range(config.num_layers)
        for expert in range(config.num_experts)
    ]
    shard = ExpertShard(
        len(ids),
        config.hidden_size,
        config.moe_intermediate_size,
        dtype=dtype,
        device=device,
        row_tile=ROW_TILE if options.bit_stable else None,
    )
    for slot, id_ in enumerate(ids):
        weights = load_expert(checkpoint, config, id_.layer, id_.expert, dtype=dtype, device=device)
        shard.write(slot, weights)
    return LocalDispatcher(shard, {id_: slot for slot, id_ in enumerate(ids)})
