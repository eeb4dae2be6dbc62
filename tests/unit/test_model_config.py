"""Configurations are understood completely or refused with key, value and what is supported."""

import json
import math
from pathlib import Path

import pytest

from tests.unit.harness_checkpoint import tiny_config
from workers.errors import CheckpointError, ConfigError
from workers.model.config import LayerType, ModelConfig

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "qwen3.5-397b-a17b" / "config.json"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000000,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "mrope_interleaved": True,
    "mrope_section": [1, 1, 0],
}
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_per_tensor": False,
    "act_per_tensor": False,
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}


def test_a_flat_configuration_is_read():
    config = ModelConfig.from_dict(tiny_config())
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (24, 2, 50)
    assert (config.linear_key_size, config.linear_value_size, config.rotary_dim) == (24, 40, 4)
    assert config.layer_types == (LayerType.LINEAR, LayerType.FULL)
    assert config.rope.theta == 10000.0
    assert config.rope.yarn is None
    assert config.eos_token_ids == (7,)
    assert config.quantization is None
    assert config.max_context_tokens == 512


def test_a_nested_configuration_reads_the_same_and_its_top_level_ties_the_embeddings():
    nested = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": True,
        "text_config": tiny_config(architectures=None, eos_token_id=None),
        "eos_token_id": [7],
        "vision_config": {"hidden_act": "gelu_pytorch_tanh"},
    }
    assert ModelConfig.from_dict(nested) == ModelConfig.from_dict(
        tiny_config(tie_word_embeddings=True)
    )


@pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published files are not beside the repository"
)
def test_the_published_configuration_of_the_397b_model_is_read():
    config = ModelConfig.load(PUBLISHED.parent)
    assert config.layer_types.count(LayerType.FULL) == 15
    assert [i for i, t in enumerate(config.layer_types) if t is LayerType.FULL][:3] == [3, 7, 11]
    assert (config.num_experts, config.num_experts_per_token, config.rotary_dim) == (512, 10, 64)
    assert config.quantization is not None
    assert config.quantization.block_size == (128, 128)
    assert "lm_head" in config.quantization.modules_to_not_convert


def test_layer_types_win_over_the_interval():
    types = ["full_attention", "linear_attention"]
    config = ModelConfig.from_dict(tiny_config(layer_types=types))
    assert config.layer_types == (LayerType.FULL, LayerType.LINEAR)


def test_yarn_is_read_and_stretches_the_context():
    config = ModelConfig.from_dict(tiny_config(rope_parameters=YARN))
    yarn = config.rope.yarn
    assert yarn is not None
    assert (yarn.factor, yarn.original_max_position_embeddings) == (4.0, 512)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.truncate) == (32, 1, True)
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert config.max_context_tokens == 2048


def test_yarn_settings_override_the_usual_ones():
    rope = YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "truncate": False}
    yarn = ModelConfig.from_dict(tiny_config(rope_parameters=rope)).rope.yarn
    assert yarn is not None
    assert (yarn.beta_fast, yarn.beta_slow, yarn.attention_factor, yarn.truncate) == (
        16,
        2,
        1.5,
        False,
    )


def test_block_fp8_is_read():
    quantization = ModelConfig.from_dict(tiny_config(quantization_config=FP8)).quantization
    assert quantization is not None
    assert quantization.block_size == (128, 128)
    assert quantization.modules_to_not_convert == ("lm_head",)


REFUSED = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    "bias": ({"attention_bias": True}, "attention_bias is True; supported: False"),
    "ungated attention": ({"attn_output_gate": False}, "attn_output_gate is False"),
    "delta net gate": ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
    "dense layers": ({"mlp_only_layers": [0]}, "mlp_only_layers is [0]; supported: []"),
    "sparse step": ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1"),
    "unnormalized gate": ({"norm_topk_prob": False}, "norm_topk_prob is False; supported: True"),
    "sliding window": ({"use_sliding_window": True}, "use_sliding_window is True"),
    "old rope": ({"rope_scaling": {"factor": 2}}, "rope_scaling is {'factor': 2}; supported: not"),
    "no rope": ({"rope_parameters": None}, "rope_parameters is None; supported: an object"),
    "rope type": (
        {"rope_parameters": YARN | {"rope_type": "llama3"}},
        "rope_parameters.rope_type is 'llama3'; supported: 'default', 'yarn'",
    ),
    "yarn factor": ({"rope_parameters": YARN | {"factor": 0.5}}, "rope_parameters.factor is 0.5"),
    "yarn mscale": ({"rope_parameters": YARN | {"mscale": 1.0}}, "rope_parameters.mscale is 1.0"),
    "odd rotary": (
        {"rope_parameters": YARN | {"partial_rotary_factor": 0.4}},
        "partial_rotary_factor is 0.4",
    ),
    "rotary above one": (
        {"rope_parameters": YARN | {"partial_rotary_factor": 1.5}},
        "partial_rotary_factor is 1.5",
    ),
    "architecture": (
        {"architectures": ["Qwen3NextForCausalLM"]},
        "architectures is ['Qwen3NextForCausalLM']; supported: Qwen3_5MoeForCausalLM",
    ),
    "model type": ({"architectures": None, "model_type": "qwen2"}, "model_type is 'qwen2'"),
    "nothing said": ({"architectures": None, "model_type": None}, "model_type is None"),
    "missing size": ({"hidden_size": None}, "hidden_size is None; supported: an integer from 1"),
    "size as text": ({"hidden_size": "24"}, "hidden_size is '24'"),
    "boolean size": ({"num_experts": True}, "num_experts is True"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "epsilon": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "query heads": ({"num_attention_heads": 5}, "a multiple of num_key_value_heads = 2"),
    "value heads": ({"linear_num_value_heads": 6}, "a multiple of linear_num_key_heads = 4"),
    "top k": ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7; supported: at most"),
    "layer name": ({"layer_types": ["mamba", "mamba"]}, "layer_types[0] is 'mamba'"),
    "layer count": ({"layer_types": ["full_attention"]}, "layer_types is '1 layers'"),
    "layer text": ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
    "no pattern": ({"full_attention_interval": None}, "full_attention_interval is None"),
    "eos": ({"eos_token_id": 50}, "eos_token_id is 50; supported: below vocab_size = 50"),
    "eos text": ({"eos_token_id": ["</s>"]}, "eos_token_id is ['</s>']; supported: token ids"),
    "nested": ({"text_config": 3}, "text_config is 3; supported: an object"),
    "quantization": (
        {"quantization_config": FP8 | {"quant_method": "awq"}},
        "quantization_config.quant_method is 'awq'; supported: 'fp8'",
    ),
    "static activations": (
        {"quantization_config": FP8 | {"activation_scheme": "static"}},
        "activation_scheme is 'static'",
    ),
    "per tensor": (
        {"quantization_config": FP8 | {"weight_per_tensor": True}},
        "weight_per_tensor is True",
    ),
    "no blocks": (
        {"quantization_config": FP8 | {"weight_block_size": None}},
        "weight_block_size is None",
    ),
    "block text": (
        {"quantization_config": FP8 | {"weight_block_size": [128, "a"]}},
        "weight_block_size is",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError) as refused:
        ModelConfig.from_dict(tiny_config(**changes))
    assert str(refused.value).startswith("config.json: ")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read: No such file"), ("{", "is no JSON"), ("[]", "holds no JSON object")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as refused:
        ModelConfig.load(tmp_path)
    assert message in str(refused.value)
    assert str(tmp_path / "config.json") in str(refused.value)


def test_a_nested_key_is_named_with_its_path_and_file(tmp_path):
    nested = {"model_type": "qwen3_5_moe", "text_config": tiny_config(hidden_size=-1)}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    with pytest.raises(CheckpointError, match=r"config\.json: text_config\.hidden_size is -1"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("size", "fits"), [(1, True), (2, True), (4, True), (3, False), (8, False)]
)
def test_tensor_parallel_sizes_must_share_the_heads(size, fits):
    config = ModelConfig.from_dict(tiny_config())
    if fits:
        config.check_tensor_parallel(size)
        return
    with pytest.raises(ConfigError, match=r"tensor_parallel: .* possible: 1, 2, 4$"):
        config.check_tensor_parallel(size)


def test_kv_heads_that_neither_divide_nor_are_divided_are_refused():
    config = ModelConfig.from_dict(
        tiny_config(
            num_attention_heads=12,
            num_key_value_heads=3,
            linear_num_key_heads=12,
            linear_num_value_heads=12,
        )
    )
    assert [t for t in range(1, 13) if config.supports_tensor_parallel(t)] == [1, 3, 6, 12]
