"""The whole model in this process, experts included: the definition of right, and a yardstick."""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.dispatch.base import Dispatcher
from workers.dispatch.local import LocalDispatcher
from workers.mesh import TensorParallelGroup
from workers.model.batch import Segment, StepBatch
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

_BLOCK_TOKENS = 16


def load_local_experts(
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    bit_stable: bool = False,
) -> LocalDispatcher:
    """Read every expert of a checkpoint into one shard; a layer's experts lie side by side."""
    shard = ExpertShard(
        config.num_layers * config.num_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        dtype=dtype,
        device=device,
        row_tile=ROW_TILE if bit_stable else None,
    )
    slot_of: dict[ExpertId, int] = {}
    for layer in range(config.num_layers):
        for expert in range(config.num_experts):
            slot = len(slot_of)
            parameters = load_expert(checkpoint, config, layer, expert, dtype=dtype, device=device)
            shard.write(slot, parameters)
            slot_of[ExpertId(layer, expert)] = slot
    return LocalDispatcher(shard, slot_of)


@dataclass(slots=True)
class Reference:
    """A decoder of one rank with its experts, and a cache for `num_sequences` at a time."""

    config: ModelConfig
    decoder: Decoder
    cache: SequenceCache
    blocks_per_sequence: int

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        context_tokens: int,
        num_sequences: int = 1,
        bit_stable: bool = False,
        probe: GateProbe | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> "Reference":
        """Load a checkpoint in float32 on the CPU; a `dispatcher` may replace local experts."""
        dtype, device = torch.float32, torch.device("cpu")
        blocks = -(-context_tokens // _BLOCK_TOKENS)
        decoder = Decoder(
            config,
            load_decoder(checkpoint, config, rank=0, size=1, dtype=dtype, device=device),
            TensorParallelGroup(),
            dispatcher
            or load_local_experts(
                config, checkpoint, dtype=dtype, device=device, bit_stable=bit_stable
            ),
            kernels=choose_kernels(device),
            options=DecoderOptions(bit_stable=bit_stable),
            probe=probe,
        )
        cache = SequenceCache(
            config,
            num_kv_blocks=blocks * num_sequences,
            block_tokens=_BLOCK_TOKENS,
            num_state_blocks=num_sequences,
            dtype=dtype,
        )
        return cls(config, decoder, cache, blocks)

    def step(self, pieces: list[tuple[int, list[int], int]], *, num_logits: int = 1) -> Tensor:
        """Compute and commit (sequence, new tokens, start) pieces; returns their logits."""
        segments = tuple(
            Segment(
                token_ids=tuple(tokens),
                start=start,
                state_block=sequence,
                kv_blocks=tuple(
                    range(
                        sequence * self.blocks_per_sequence,
                        sequence * self.blocks_per_sequence
                        + -(-(start + len(tokens)) // _BLOCK_TOKENS),
                    )
                ),
                num_logits=min(num_logits, len(tokens)),
            )
            for sequence, tokens, start in pieces
        )
        logits = self.decoder.forward(StepBatch(segments=segments), self.cache)
        self.cache.commit()
        return logits
