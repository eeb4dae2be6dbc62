"""The architecture of a checkpoint, read from its config.json; what we cannot serve is refused.

A configuration is either understood completely or refused with the key, its value and what is
supported: a setting that is silently ignored gives wrong tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from workers.errors import ConfigError
from workers.model.published import Section, read_json

ARCHITECTURES = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")
MODEL_TYPES = ("qwen3_5_moe_text", "qwen3_5_moe")

# Settings with one supported value each; None among them means that the key may be absent or null.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "attn_output_gate": (True, None),
    "output_gate_type": ("swish", "silu", None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "norm_topk_prob": (True, None),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
}


class LayerType(Enum):
    """The token mixer of a decoder layer."""

    LINEAR = "linear_attention"
    FULL = "full_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """Static YaRN: stretched rotary frequencies for long contexts.

    `attention_factor` multiplies cosine and sine. `truncate` rounds the corrected range of
    frequencies to whole ones.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the first `partial_rotary_factor` of each head."""

    theta: float
    partial_rotary_factor: float
    yarn: YarnConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """Block FP8: each block of `block_size` (rows, columns) has one scale, a multiplier."""

    block_size: tuple[int, int]
    modules_to_not_convert: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Qwen3.5-MoE text model. Sizes are those of the whole model, not of a rank."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    layer_types: tuple[LayerType, ...]
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel: int
    num_experts: int
    num_experts_per_token: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig | None = None

    @classmethod
    def load(cls, directory: Path) -> "ModelConfig":
        """Read config.json of a checkpoint directory.

        Raises CheckpointError when the file is missing, is no JSON object, or describes a model
        that is not supported.
        """
        return cls._read(read_json(Path(directory) / "config.json"))

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> "ModelConfig":
        """Read a published configuration, flat or nested under `text_config`.

        Raises CheckpointError naming the key, its value and what is supported.
        """
        return cls._read(Section(published, "config.json"))

    @classmethod
    def _read(cls, top: Section) -> "ModelConfig":
        _check_architecture(top)
        text = top.section("text_config") if "text_config" in top.values else top
        for key, supported in _SUPPORTED.items():
            text.choice(key, supported)
        # Of a nested configuration, the top level decides these two where it names them.
        tied_at = top if "tie_word_embeddings" in top.values else text
        quantized = top if "quantization_config" in top.values else text
        config = cls(
            vocab_size=text.integer("vocab_size"),
            hidden_size=text.integer("hidden_size"),
            num_layers=text.integer("num_hidden_layers"),
            layer_types=_layer_types(text, text.integer("num_hidden_layers")),
            num_attention_heads=text.integer("num_attention_heads"),
            num_kv_heads=text.integer("num_key_value_heads"),
            head_dim=text.integer("head_dim"),
            rope=_rope(text),
            linear_num_key_heads=text.integer("linear_num_key_heads"),
            linear_num_value_heads=text.integer("linear_num_value_heads"),
            linear_key_head_dim=text.integer("linear_key_head_dim"),
            linear_value_head_dim=text.integer("linear_value_head_dim"),
            linear_conv_kernel=text.integer("linear_conv_kernel_dim", minimum=2),
            num_experts=text.integer("num_experts"),
            num_experts_per_token=text.integer("num_experts_per_tok"),
            moe_intermediate_size=text.integer("moe_intermediate_size"),
            shared_expert_intermediate_size=text.integer("shared_expert_intermediate_size"),
            rms_norm_eps=text.number("rms_norm_eps"),
            tie_word_embeddings=bool(tied_at.choice("tie_word_embeddings", (False, True, None))),
            max_position_embeddings=text.integer("max_position_embeddings"),
            eos_token_ids=text.token_ids("eos_token_id") or top.token_ids("eos_token_id"),
            quantization=_quantization(quantized),
        )
        _check_consistent(config, text)
        return config

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def max_context_tokens(self) -> int:
        """Positions that the rotary embedding covers, stretched by YaRN where there is one."""
        yarn = self.rope.yarn
        stretched = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 0
        return max(self.max_position_embeddings, stretched)

    @property
    def linear_key_size(self) -> int:
        """Rows of all key heads of a DeltaNet layer; the queries have as many."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_size(self) -> int:
        """Rows of all value heads of a DeltaNet layer."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    def supports_tensor_parallel(self, size: int) -> bool:
        """Whether `size` ranks can share the heads; KV heads are replicated beyond their number."""
        return (
            size >= 1
            and self.num_attention_heads % size == 0
            and self.linear_num_key_heads % size == 0
            and (self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0)
        )

    def check_tensor_parallel(self, size: int) -> None:
        """Raise ConfigError, naming the possible sizes, when `size` ranks cannot share heads."""
        if self.supports_tensor_parallel(size):
            return
        possible = [t for t in range(1, 257) if self.supports_tensor_parallel(t)]
        raise ConfigError(
            f"tensor_parallel: {size} ranks cannot share {self.num_attention_heads} attention "
            f"heads, {self.num_kv_heads} KV heads and {self.linear_num_key_heads} linear key "
            f"heads evenly; possible: {', '.join(map(str, possible))}"
        )


def _check_architecture(top: Section) -> None:
    architectures = top.get("architectures", [])
    if architectures:
        if not isinstance(architectures, list) or not set(architectures) <= set(ARCHITECTURES):
            raise top.refuse("architectures", architectures, ", ".join(ARCHITECTURES))
    else:
        top.choice("model_type", MODEL_TYPES)


def _layer_types(text: Section, num_layers: int) -> tuple[LayerType, ...]:
    published = text.get("layer_types")
    if published is None:
        interval = text.integer("full_attention_interval")
        return tuple(
            LayerType.LINEAR if (layer + 1) % interval else LayerType.FULL
            for layer in range(num_layers)
        )
    known = [t.value for t in LayerType]
    if not isinstance(published, list):
        raise text.refuse("layer_types", published, f"a list of {', '.join(known)}")
    for layer, name in enumerate(published):
        if name not in known:
            raise text.refuse(f"layer_types[{layer}]", name, ", ".join(known))
    if len(published) != num_layers:
        raise text.refuse(
            "layer_types", f"{len(published)} layers", f"num_hidden_layers = {num_layers}"
        )
    return tuple(LayerType(name) for name in published)


def _rope(text: Section) -> RopeConfig:
    rope = text.section("rope_parameters")
    kind = rope.choice("rope_type", ("default", "yarn", None))
    return RopeConfig(
        theta=rope.number("rope_theta"),
        partial_rotary_factor=rope.number(
            "partial_rotary_factor", text.number("partial_rotary_factor", 0.25), maximum=1
        ),
        yarn=_yarn(rope, text) if kind == "yarn" else None,
    )


def _yarn(rope: Section, text: Section) -> YarnConfig:
    factor = rope.number("factor")
    if factor < 1:
        raise rope.refuse("factor", factor, "a number from 1")
    for key in ("mscale", "mscale_all_dim"):
        rope.choice(key, (None,))
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", text.integer("max_position_embeddings")
        ),
        beta_fast=rope.number("beta_fast", 32),
        beta_slow=rope.number("beta_slow", 1),
        # The published rule, as in transformers modeling_rope_utils.
        attention_factor=rope.number("attention_factor", 0.1 * math.log(factor) + 1),
        truncate=rope.choice("truncate", (True, False, None)) is not False,
    )


def _quantization(owner: Section) -> QuantizationConfig | None:
    if owner.get("quantization_config") is None:
        return None
    section = owner.section("quantization_config")
    section.choice("quant_method", ("fp8",))
    section.choice("activation_scheme", ("dynamic", None))
    section.choice("fmt", ("e4m3", None))
    for key in ("weight_per_tensor", "act_per_tensor"):
        section.choice(key, (False, None))
    block = section.get("weight_block_size")
    if not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise section.refuse("weight_block_size", block, "two integers from 1, such as [128, 128]")
    modules = section.get("modules_to_not_convert", [])
    if not (isinstance(modules, list) and all(isinstance(m, str) for m in modules)):
        raise section.refuse("modules_to_not_convert", modules, "a list of module names")
    return QuantizationConfig(
        block_size=(block[0], block[1]), modules_to_not_convert=tuple(modules)
    )


def _check_consistent(config: ModelConfig, text: Section) -> None:
    """Refuse head counts that do not divide, more chosen experts than there are, and the like."""
    for key, divisor_key in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        value, divisor = text.integer(key), text.integer(divisor_key)
        if value % divisor:
            raise text.refuse(key, value, f"a multiple of {divisor_key} = {divisor}")
    if config.num_experts_per_token > config.num_experts:
        most = f"at most num_experts = {config.num_experts}"
        raise text.refuse("num_experts_per_tok", config.num_experts_per_token, most)
    if config.rotary_dim % 2 or not 2 <= config.rotary_dim <= config.head_dim:
        raise text.refuse(
            "rope_parameters.partial_rotary_factor",
            config.rope.partial_rotary_factor,
            f"an even number of the {config.head_dim} dimensions of a head",
        )
    for token_id in config.eos_token_ids:
        if token_id >= config.vocab_size:
            raise text.refuse("eos_token_id", token_id, f"below vocab_size = {config.vocab_size}")
