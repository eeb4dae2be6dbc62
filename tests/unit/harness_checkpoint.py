"""Tiny checkpoints for tests, named and shaped by hand and not by the loading plan."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A published flat configuration in which no two sizes are equal by accident."""
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "eos_token_id": 7,
        "full_attention_interval": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 24,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 6,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 5,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 10,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "shared_expert_intermediate_size": 14,
        "tie_word_embeddings": False,
        "vocab_size": 50,
    } | changes


def tiny_tensors(
    *,
    prefix: str = "model.",
    fused: bool = True,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Random tensors of `tiny_config`, by published name."""
    draw = torch.Generator().manual_seed(0)

    def rand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    tensors = {f"{prefix}embed_tokens.weight": rand(50, 24), f"{prefix}norm.weight": rand(24)}
    if not tied:
        tensors["lm_head.weight"] = rand(50, 24)
    linear = f"{prefix}layers.0.linear_attn."
    full = f"{prefix}layers.1.self_attn."
    tensors |= {
        f"{linear}in_proj_qkv.weight": rand(24 + 24 + 40, 24),
        f"{linear}in_proj_z.weight": rand(40, 24),
        f"{linear}in_proj_b.weight": rand(8, 24),
        f"{linear}in_proj_a.weight": rand(8, 24),
        f"{linear}conv1d.weight": rand(88, 1, 4),
        f"{linear}A_log": rand(8, dtype=torch.float32),
        f"{linear}dt_bias": rand(8),
        f"{linear}norm.weight": rand(5, dtype=torch.float32),
        f"{linear}out_proj.weight": rand(24, 40),
        f"{full}q_proj.weight": rand(4 * 2 * 8, 24),
        f"{full}k_proj.weight": rand(16, 24),
        f"{full}v_proj.weight": rand(16, 24),
        f"{full}o_proj.weight": rand(24, 32),
        f"{full}q_norm.weight": rand(8),
        f"{full}k_norm.weight": rand(8),
    }
    for layer in range(2):
        base = f"{prefix}layers.{layer}."
        tensors |= {
            f"{base}input_layernorm.weight": rand(24),
            f"{base}post_attention_layernorm.weight": rand(24),
            f"{base}mlp.gate.weight": rand(6, 24),
            f"{base}mlp.shared_expert.gate_proj.weight": rand(14, 24),
            f"{base}mlp.shared_expert.up_proj.weight": rand(14, 24),
            f"{base}mlp.shared_expert.down_proj.weight": rand(24, 14),
            f"{base}mlp.shared_expert_gate.weight": rand(1, 24),
        }
        gate_up, down = rand(6, 20, 24), rand(6, 24, 10)
        experts = f"{base}mlp.experts."
        if fused:
            tensors |= {f"{experts}gate_up_proj": gate_up, f"{experts}down_proj": down}
            continue
        for expert in range(6):
            tensors |= {
                f"{experts}{expert}.gate_proj.weight": gate_up[expert, :10].clone(),
                f"{experts}{expert}.up_proj.weight": gate_up[expert, 10:].clone(),
                f"{experts}{expert}.down_proj.weight": down[expert].clone(),
            }
    return tensors


QUANTIZED = ("in_proj_qkv", "in_proj_z", "out_proj", "_proj.weight", "gate_up_proj", "down_proj")


def to_fp8(
    tensors: dict[str, Tensor], block_size: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Quantize what is published in FP8; returns the tensors to write, and all multiplied out."""
    written, plain = dict(tensors), dict(tensors)
    rows, columns = block_size
    for name, tensor in tensors.items():
        if not name.endswith(QUANTIZED) or "in_proj_a." in name or "in_proj_b." in name:
            continue
        height, width = tensor.shape[-2:]
        # Scales that differ from block to block, and by no power of two.
        scale = torch.rand(*tensor.shape[:-2], -(-height // rows), -(-width // columns)) + 0.1
        scale = scale.to(scale_dtype)
        spread = scale.float().repeat_interleave(rows, -2)[..., :height, :]
        spread = spread.repeat_interleave(columns, -1)[..., :width]
        written[name] = (tensor.float() / spread).to(torch.float8_e4m3fn)
        written[name + "_scale_inv"] = scale
        plain[name] = written[name].float() * spread
    return written, plain


def write_checkpoint(
    directory: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    num_files: int = 0,
) -> Path:
    """Write a checkpoint: one file, or `num_files` with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or tiny_config()))
    if not num_files:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = sorted(tensors)
    file_of = {
        name: f"model-{i % num_files + 1:05}-of-{num_files:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(file_of.values()):
        save_file({n: tensors[n] for n in names if file_of[n] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": file_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
