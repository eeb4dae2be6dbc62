"""Tiny models of the Hugging Face implementation, and our decoder over the same checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

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

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
TOLERANCE = 1e-4  # of the scale of the logits
WEIGHT_SCALE = 0.4


def published(**changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny model: linear, linear, full attention, linear."""
    return {
        "vocab_size": 301,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "layer_types": [
            "full_attention" if layer == 2 else "linear_attention" for layer in range(4)
        ],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    } | changes


def write_oracle(directory: Path, settings: dict[str, Any], seed: int = 0) -> Any:
    """Build the Hugging Face model of some settings, save it in the published layout, return it.

    Norm weights and biases begin as zeros and ones, which would hide a 1 + w where w is meant, so
    they are disturbed; large weights make the gate and the logits differ between tokens.
    """
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    draw = torch.Generator().manual_seed(seed)
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**settings)).eval().float()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * WEIGHT_SCALE * parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory, save_original_format=False)
    return model


def oracle_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Return the Hugging Face logits of every position."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor(token_ids)[None], use_cache=False).logits[0]
    return logits.float()


def draw_tokens(num_tokens: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Draw token ids."""
    draw = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, vocab_size, (num_tokens,), generator=draw).tolist()
    return ids


def load_local(checkpoint: Checkpoint, config: ModelConfig, row_tile: int | None) -> Dispatcher:
    """Return a dispatcher over all experts, in this process."""
    num_slots = config.num_layers * config.num_experts
    shard = ExpertShard(
        num_slots, config.hidden_size, config.moe_intermediate_size, row_tile=row_tile
    )
    slots = {}
    for slot in range(num_slots):
        layer, expert = divmod(slot, config.num_experts)
        weights = load_expert(checkpoint, config, layer, expert, dtype=torch.float32, device=CPU)
        shard.write(slot, weights)
        slots[ExpertId(layer, expert)] = slot
    return LocalDispatcher(shard, slots)


@dataclass
class Model:
    """One rank's decoder and cache, with sequences numbered by their state blocks."""

    config: ModelConfig
    decoder: Decoder
    cache: SequenceCache
    sequence_blocks: int
    lengths: dict[int, int]

    def step(self, *work: tuple[int, Sequence[int]]) -> list[Tensor]:
        """Compute the next tokens of some sequences; returns the logits of all their rows."""
        segments = []
        for sequence, token_ids in work:
            first = sequence * self.sequence_blocks
            segments.append(
                Segment(
                    token_ids=tuple(token_ids),
                    start=self.lengths.get(sequence, 0),
                    state_block=sequence,
                    # Backwards, so that a wrong block order is seen.
                    kv_blocks=tuple(reversed(range(first, first + self.sequence_blocks))),
                    num_logits=len(token_ids),
                )
            )
        logits = self.decoder.forward(StepBatch(segments=tuple(segments)), self.cache)
        self.cache.commit()
        for sequence, token_ids in work:
            self.lengths[sequence] = self.lengths.get(sequence, 0) + len(token_ids)
        return list(logits.split([len(token_ids) for _, token_ids in work]))

    def run(self, token_ids: Sequence[int], cuts: Sequence[int], sequence: int = 0) -> Tensor:
        """Compute one sequence alone, in chunks of the given sizes; returns all its logits."""
        self.lengths.pop(sequence, None)
        ends = list(accumulate(cuts))
        assert ends[-1] == len(token_ids)
        return torch.cat(
            [
                self.step((sequence, token_ids[end - cut : end]))[0]
                for end, cut in zip(ends, cuts, strict=True)
            ]
        )


def load_model(
    directory: Path,
    group: TensorParallelGroup | None = None,
    *,
    options: DecoderOptions | None = None,
    probe: GateProbe | None = None,
    num_sequences: int = 8,
    max_tokens: int = 256,
) -> Model:
    """Load one rank's decoder, with all experts in this process."""
    group = group or TensorParallelGroup()
    options = options or DecoderOptions()
    config = ModelConfig.load(directory)
    blocks = -(-max_tokens // BLOCK_TOKENS)
    with Checkpoint(directory) as checkpoint:
        parameters = load_decoder(
            checkpoint, config, rank=group.rank, size=group.size, dtype=torch.float32, device=CPU
        )
        dispatcher = load_local(checkpoint, config, ROW_TILE if options.bit_stable else None)
    decoder = Decoder(
        config,
        parameters,
        group,
        dispatcher,
        kernels=choose_kernels(CPU),
        options=options,
        probe=probe,
    )
    cache = SequenceCache(
        config,
        num_kv_blocks=num_sequences * blocks,
        block_tokens=BLOCK_TOKENS,
        num_state_blocks=num_sequences,
        tp_size=group.size,
        rank=group.rank,
    )
    return Model(config, decoder, cache, blocks, {})


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Assert that logits agree within the tolerance, relative to their scale."""
    scale = expected.abs().max().item()
    gap = (actual - expected).abs().max().item()

    assert gap <= TOLERANCE * scale, f"logits differ by {gap:.2e}, their scale is {scale:.2e}"
