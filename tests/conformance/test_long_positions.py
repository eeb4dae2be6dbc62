"""Rotations at positions up to a million are those of transformers, with YaRN."""

import pytest
import torch

from tests.conformance.harness_model import CPU, published
from workers.model.config import ModelConfig
from workers.model.rope import RotaryEmbedding

MILLION = 1_010_000
ROPE = {
    "rope_theta": 10_000_000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144}


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, YARN], ids=["plain", "yarn"])
def test_rotations_up_to_a_million_positions_are_those_of_transformers(rope) -> None:
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

    settings = published(
        architectures=["Qwen3_5MoeForCausalLM"],
        model_type="qwen3_5_moe_text",
        head_dim=256,
        max_position_embeddings=262_144,
        rope_parameters=ROPE | rope,
    )
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, MILLION, (500,), generator=draw).tolist()
    positions = torch.tensor([0, 1, 262_143, 262_144, MILLION - 1, *drawn])
    config = Qwen3_5MoeTextConfig(**settings)
    oracle = Qwen3_5MoeTextRotaryEmbedding(config)
    cos, sin = oracle(torch.zeros(1, 1, 1), positions[None])

    rotary = RotaryEmbedding(ModelConfig.from_dict(config.to_dict()), CPU)
    rotations = rotary.rotations(positions)[:, 0]

    assert rotations.shape == (len(positions), 32)
    torch.testing.assert_close(rotations.real, cos[0, :, :32], atol=1e-6, rtol=0)
    torch.testing.assert_close(rotations.imag, sin[0, :, :32], atol=1e-6, rtol=0)
