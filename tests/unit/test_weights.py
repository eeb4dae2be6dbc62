"""What is loaded equals the published tensors, sliced by hand, and nothing else is read."""

import json
from dataclasses import fields

import pytest
import torch

from tests.unit.harness_checkpoint import tiny_config, tiny_tensors, to_fp8, write_checkpoint
from workers.errors import CheckpointError, ConfigError
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.model.weights import GenerationDefaults, load_decoder, load_expert

CPU = torch.device("cpu")
SIZES = (1, 2, 4)  # two KV heads: at 4 each is held by two ranks


def slices_of_rank(tensors, prefix, rank, size):
    """Cut a tiny checkpoint for one rank, by field of the parameters, without the plan."""
    outer = {
        "embed": tensors[f"{prefix}embed_tokens.weight"].split(-(-50 // size))[rank],
        "norm": tensors[f"{prefix}norm.weight"],
    }
    if "lm_head.weight" in tensors:
        outer["head"] = tensors["lm_head.weight"].split(-(-50 // size))[rank]
    linear = {
        name.removeprefix(f"{prefix}layers.0.linear_attn.").removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if ".linear_attn." in name
    }

    def segments(tensor):
        return torch.cat([part.chunk(size)[rank] for part in tensor.split([24, 24, 40])])

    delta_net = {
        "qkv": segments(linear["in_proj_qkv"]),
        "z": linear["in_proj_z"].chunk(size)[rank],
        "b": linear["in_proj_b"].chunk(size)[rank],
        "a": linear["in_proj_a"].chunk(size)[rank],
        "conv": segments(linear["conv1d"])[:, 0],
        "a_log": linear["A_log"].chunk(size)[rank],
        "dt_bias": linear["dt_bias"].chunk(size)[rank],
        "norm": linear["norm"],
        "out": linear["out_proj"].chunk(size, dim=1)[rank],
    }
    full = f"{prefix}layers.1.self_attn."
    kv_parts, kv_part = (size, rank) if size <= 2 else (2, rank * 2 // size)
    attention = {
        "q_gate": tensors[f"{full}q_proj.weight"].chunk(size)[rank],
        "k": tensors[f"{full}k_proj.weight"].chunk(kv_parts)[kv_part],
        "v": tensors[f"{full}v_proj.weight"].chunk(kv_parts)[kv_part],
        "o": tensors[f"{full}o_proj.weight"].chunk(size, dim=1)[rank],
        "q_norm": tensors[f"{full}q_norm.weight"],
        "k_norm": tensors[f"{full}k_norm.weight"],
    }
    layers = []
    for layer, mixer in enumerate((delta_net, attention)):
        base = f"{prefix}layers.{layer}."
        shared = f"{base}mlp.shared_expert."
        norms = {
            "input_norm": tensors[f"{base}input_layernorm.weight"],
            "post_norm": tensors[f"{base}post_attention_layernorm.weight"],
        }
        moe = {
            "gate": tensors[f"{base}mlp.gate.weight"],
            "shared_gate_up": torch.cat(
                [tensors[f"{shared}gate_proj.weight"], tensors[f"{shared}up_proj.weight"]]
            ),
            "shared_down": tensors[f"{shared}down_proj.weight"],
            "shared_gate": tensors[f"{base}mlp.shared_expert_gate.weight"],
        }
        layers.append((norms, mixer, moe))
    return outer, layers


def assert_fields(parameters, expected, dtype=torch.float32):
    for name, tensor in expected.items():
        loaded = getattr(parameters, name)
        assert loaded.is_contiguous(), name
        keep = "norm" in name or name in {"a_log", "dt_bias"}
        assert loaded.dtype is (torch.float32 if keep else dtype), name
        assert torch.equal(loaded, tensor.to(loaded.dtype)), name


def load_rank(directory, rank, size, dtype=torch.float32):
    with Checkpoint(directory) as checkpoint:
        config = ModelConfig.load(directory)
        loaded = load_decoder(checkpoint, config, rank=rank, size=size, dtype=dtype, device=CPU)
        return loaded, checkpoint.bytes_read


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("published", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_each_rank_gets_its_slices_and_reads_just_their_bytes(tmp_path, prefix, published, size):
    tensors = tiny_tensors(prefix=prefix, dtype=published)
    write_checkpoint(tmp_path, tensors, num_files=2)
    for rank in range(size):
        loaded, bytes_read = load_rank(tmp_path, rank, size)
        outer, layers = slices_of_rank(tensors, prefix, rank, size)
        rows = -(-50 // size)
        assert loaded.vocab_start == rank * rows
        for name in ("embed", "head"):
            table = getattr(loaded, name)
            assert table.shape == (rows, 24)
            assert torch.equal(table[: len(outer[name])], outer[name].float())
            assert not table[len(outer[name]) :].any()
        assert_fields(loaded, {"norm": outer["norm"]})
        for layer, (norms, mixer, moe) in zip(loaded.layers, layers, strict=True):
            assert_fields(layer, norms)
            assert {f.name for f in fields(layer.mixer)} == set(mixer)
            assert_fields(layer.mixer, mixer)
            assert {f.name for f in fields(layer.moe)} == set(moe)
            assert_fields(layer.moe, moe)
        parts = [*outer.values(), *(t for layer in layers for part in layer for t in part.values())]
        assert bytes_read == sum(t.nbytes for t in parts)


def test_a_rank_of_four_reads_about_a_quarter_of_what_is_split(tmp_path):
    tensors = tiny_tensors()
    write_checkpoint(tmp_path, tensors)
    dense = sum(t.nbytes for name, t in tensors.items() if ".experts." not in name)
    assert load_rank(tmp_path, 0, 1)[1] == dense
    assert load_rank(tmp_path, 0, 4)[1] < dense // 2


def test_tied_embeddings_are_one_tensor_and_read_once(tmp_path):
    tensors = tiny_tensors(tied=True)
    write_checkpoint(tmp_path, tensors, tiny_config(tie_word_embeddings=True))
    loaded, bytes_read = load_rank(tmp_path, 0, 1)
    assert loaded.head is loaded.embed
    dense = sum(t.nbytes for name, t in tensors.items() if ".experts." not in name)
    assert bytes_read == dense
    last, _ = load_rank(tmp_path, 3, 4)
    assert last.head is last.embed


def test_a_lower_compute_dtype_leaves_what_decides_in_float32(tmp_path):
    tensors = tiny_tensors(dtype=torch.float32)
    write_checkpoint(tmp_path, tensors)
    loaded, _ = load_rank(tmp_path, 1, 2, dtype=torch.bfloat16)
    outer, layers = slices_of_rank(tensors, "model.", 1, 2)
    assert_fields(loaded, {"norm": outer["norm"]})
    for layer, (norms, mixer, moe) in zip(loaded.layers, layers, strict=True):
        for part, expected in ((layer, norms), (layer.mixer, mixer), (layer.moe, moe)):
            assert_fields(part, expected, torch.bfloat16)


@pytest.mark.parametrize("fused", [True, False])
def test_an_expert_is_loaded_and_only_its_bytes_are_read(tmp_path, fused):
    tensors = tiny_tensors(fused=fused)
    plain = tiny_tensors(fused=True)
    write_checkpoint(tmp_path, tensors)
    config = ModelConfig.load(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        for held, (layer, expert) in enumerate([(0, 0), (1, 5), (1, 2)], start=1):
            loaded = load_expert(checkpoint, config, layer, expert, dtype=torch.float32, device=CPU)
            base = f"model.layers.{layer}.mlp.experts."
            assert torch.equal(loaded.gate_up, plain[f"{base}gate_up_proj"][expert].float())
            assert torch.equal(loaded.down, plain[f"{base}down_proj"][expert].float())
            assert checkpoint.bytes_read == held * 3 * 24 * 10 * 2


# Blocks that no slice is aligned to, blocks larger than a tensor, and the published ones.
@pytest.mark.parametrize("block_size", [(7, 6), (5, 9), (3, 100), (128, 128)])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fused", [True, False])
def test_block_fp8_is_multiplied_out_for_every_slice(tmp_path, block_size, scale_dtype, fused):
    written, plain = to_fp8(tiny_tensors(fused=fused), block_size, scale_dtype)
    quantization = {"quant_method": "fp8", "weight_block_size": list(block_size)}
    write_checkpoint(tmp_path, written, tiny_config(quantization_config=quantization))
    for size in SIZES:
        for rank in range(size):
            loaded, _ = load_rank(tmp_path, rank, size)
            _, layers = slices_of_rank(plain, "model.", rank, size)
            for layer, (norms, mixer, moe) in zip(loaded.layers, layers, strict=True):
                assert_fields(layer, norms)
                assert_fields(layer.mixer, mixer)
                assert_fields(layer.moe, moe)
    config = ModelConfig.load(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        loaded = load_expert(checkpoint, config, 1, 4, dtype=torch.float32, device=CPU)
    base = "model.layers.1.mlp.experts."
    if fused:
        gate_up, down = plain[f"{base}gate_up_proj"][4], plain[f"{base}down_proj"][4]
    else:
        parts = [plain[f"{base}4.{name}_proj.weight"] for name in ("gate", "up")]
        gate_up, down = torch.cat(parts), plain[f"{base}4.down_proj.weight"]
    assert torch.equal(loaded.gate_up, gate_up)
    assert torch.equal(loaded.down, down)


def test_an_fp8_expert_reads_its_weights_and_its_scales_only(tmp_path):
    written, _ = to_fp8(tiny_tensors(fused=False), (7, 6), torch.float32)
    quantization = {"quant_method": "fp8", "weight_block_size": [7, 6]}
    write_checkpoint(tmp_path, written, tiny_config(quantization_config=quantization))
    with Checkpoint(tmp_path) as checkpoint:
        load_expert(checkpoint, ModelConfig.load(tmp_path), 0, 3, dtype=torch.bfloat16, device=CPU)
        own = [t for name, t in written.items() if "layers.0.mlp.experts.3." in name]
        assert len(own) == 6
        assert checkpoint.bytes_read == sum(t.nbytes for t in own)


def test_nothing_is_read_when_a_tensor_is_wrong(tmp_path):
    tensors = tiny_tensors()
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(6, 24, 11)
    write_checkpoint(tmp_path, tensors)
    config = ModelConfig.load(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match=r"no tensor model.layers.1.self_attn.o_proj"):
            load_decoder(checkpoint, config, rank=0, size=1, dtype=torch.float32, device=CPU)
        with pytest.raises(CheckpointError, match=r"experts.down_proj has shape \[6, 24, 11\]"):
            load_expert(checkpoint, config, 0, 0, dtype=torch.float32, device=CPU)
        assert checkpoint.bytes_read == 0


def test_ranks_that_cannot_share_the_heads_are_refused(tmp_path):
    write_checkpoint(tmp_path, tiny_tensors())
    with pytest.raises(ConfigError, match="tensor_parallel: 3 ranks cannot share 4 attention"):
        load_rank(tmp_path, 0, 3)


def generation(directory, **published):
    (directory / "config.json").write_text(json.dumps(tiny_config()))
    (directory / "generation_config.json").write_text(json.dumps(published))
    return GenerationDefaults.load(directory)


def test_generation_defaults_are_read(tmp_path):
    assert generation(
        tmp_path, do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[2, 0]
    ) == GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20, eos_token_ids=(2, 0))


def test_without_do_sample_decoding_is_greedy(tmp_path):
    assert generation(tmp_path, do_sample=False, temperature=0.6).temperature == 0.0
    assert generation(tmp_path, temperature=0.6).temperature == 0.0
    assert generation(tmp_path, do_sample=True).temperature == 1.0


def test_without_generation_config_the_ends_are_those_of_the_configuration(tmp_path):
    assert generation(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").unlink()
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(eos_token_ids=(7,))


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature is -1; supported: a number from 0"),
        ({"top_p": 1.5}, "top_p is 1.5; supported: a number above 0, at most 1"),
        ({"top_k": -1}, "top_k is -1; supported: an integer from 0"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ],
)
def test_generation_defaults_out_of_range_are_refused(tmp_path, published, message):
    with pytest.raises(CheckpointError) as refused:
        generation(tmp_path, **published)
    assert message in str(refused.value)
    assert "generation_config.json" in str(refused.value)
