"""Checkpoints are checked before they are used, and only what is asked for is read."""

import json
import math
import struct
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.unit.harness_checkpoint import tiny_config, tiny_tensors, to_fp8, write_checkpoint
from workers.errors import CheckpointError
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.model.verify import verify

CONFIG = ModelConfig.from_dict(tiny_config())


def write_raw(directory, header, data=b"", config="{}"):
    """Write a safetensors file by hand, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (directory / "config.json").write_text(config)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("num_files", [0, 1, 3])
def test_tensors_are_found_in_one_file_or_several(tmp_path, num_files):
    tensors = tiny_tensors()
    with Checkpoint(write_checkpoint(tmp_path, tensors, num_files=num_files)) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.bytes_read == sum(t.nbytes for t in tensors.values())


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), shape=SHAPES, dtype=DTYPES)
def test_a_slice_is_read_exactly_and_nothing_else(tmp_path_factory, data, shape, dtype):
    directory = tmp_path_factory.mktemp("slices")
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    save_file({"before": torch.ones(3), "x": tensor}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    index = []
    for size in shape[: data.draw(st.integers(0, len(shape)))]:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    with Checkpoint(directory) as checkpoint:
        read = checkpoint.read("x", tuple(index))
        assert read.dtype is dtype
        assert torch.equal(read, tensor[tuple(index)])
        assert checkpoint.bytes_read == read.nbytes


def test_a_scalar_is_read(tmp_path):
    save_file({"x": torch.tensor(2.5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("x") == torch.tensor(2.5)


def test_several_threads_read_at_once_and_every_byte_is_counted(tmp_path):
    tensors = tiny_tensors()
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, num_files=3))
    wrong = []

    def read_all():
        wrong.extend(n for n, t in tensors.items() if not torch.equal(checkpoint.read(n), t))

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    checkpoint.close()
    assert not wrong
    assert checkpoint.bytes_read == 4 * sum(t.nbytes for t in tensors.values())


def test_the_fingerprint_names_the_weights_and_not_the_place(tmp_path):
    tensors = tiny_tensors()
    first = Checkpoint(write_checkpoint(tmp_path / "a", tensors)).fingerprint
    assert Checkpoint(write_checkpoint(tmp_path / "b", tensors)).fingerprint == first
    trained = {name: tensor + 1 for name, tensor in tensors.items()}
    assert Checkpoint(write_checkpoint(tmp_path / "c", trained)).fingerprint != first
    other = write_checkpoint(tmp_path / "d", tensors, tiny_config(rms_norm_eps=1e-5))
    assert Checkpoint(other).fingerprint != first


MALFORMED = {
    "empty file": (None, b"", "is truncated or no safetensors file: 0 bytes"),
    "no header": (b"", b"", "is truncated or no safetensors file"),
    "no JSON": (b"hello!", b"", "malformed header"),
    "a list": (b"[1, 2]", b"", "malformed header"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}}, b"", "malformed header at tensor x"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, b"", "at tensor x"),
    "text shape": ({"x": entry(["2"], 0, 8)}, bytes(8), "malformed header at tensor x"),
    "dtype": ({"x": entry([2], 0, 8, "F4")}, bytes(8), "at tensor x: KeyError('F4'); known dtypes"),
    "too few bytes": (
        {"x": entry([3], 0, 8)},
        bytes(8),
        "x of shape [3] and torch.float32 needs 12",
    ),
    "negative": ({"x": entry([-1, -2], 0, 8)}, bytes(8), "tensor x of shape [-1, -2]"),
    "a gap": (
        {"x": entry([2], 0, 8), "y": entry([1], 12, 16)},
        bytes(16),
        "tensor y begins at byte",
    ),
    "overlap": ({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, bytes(12), "tensor y begins"),
    "truncated": ({"x": entry([2], 0, 8), "y": entry([2], 8, 16)}, bytes(15), "; y would end at"),
    "too long": ({"x": entry([2], 0, 8)}, bytes(9), "; x would end at byte"),
}


@pytest.mark.parametrize(("header", "data", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_damaged_file_is_refused_by_name(tmp_path, header, data, message):
    if header is None:
        (tmp_path / "model.safetensors").write_bytes(b"")
    else:
        write_raw(tmp_path, header, data)
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(refused.value)
    assert message in str(refused.value)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file: 10 bytes"):
        Checkpoint(tmp_path)


def test_a_truncated_part_of_several_is_refused_before_anything_is_loaded(tmp_path):
    write_checkpoint(tmp_path, tiny_tensors(), num_files=3)
    part = tmp_path / "model-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: has \d+ bytes"):
        Checkpoint(tmp_path)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path):
    write_checkpoint(tmp_path, tiny_tensors(), num_files=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    some_file = index["weight_map"]["lm_head.weight"]
    for weight_map, message in (
        (index["weight_map"] | {"x": "gone.safetensors"}, r"gone\.safetensors: cannot be read"),
        (index["weight_map"] | {"x": some_file}, rf"{some_file}: has no tensor x"),
        ({"x": 3}, "weight_map does not map"),
        (None, "weight_map is None"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(tmp_path)


def test_a_directory_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        Checkpoint(tmp_path)


def test_a_file_that_shrinks_after_opening_ends_in_an_error_and_not_in_a_dead_process(tmp_path):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tiny_tensors()))
    last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].offset)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    with checkpoint, pytest.raises(CheckpointError, match="ends within tensor"):
        checkpoint.read(last)


def test_an_unknown_tensor_is_refused(tmp_path):
    with (
        Checkpoint(write_checkpoint(tmp_path, tiny_tensors())) as checkpoint,
        pytest.raises(CheckpointError, match="no tensor nonsense"),
    ):
        checkpoint.read("nonsense")


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_published_layout_is_accepted_beside_draft_head_and_vision(
    tmp_path, prefix, fused, tied
):
    stray = {
        "mtp.fc.weight": torch.zeros(2, 2),
        "model.visual.pos_embed.weight": torch.zeros(2, 2),
        "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2),
    }
    tensors = tiny_tensors(prefix=prefix, fused=fused, tied=tied) | stray
    published = tiny_config(tie_word_embeddings=tied)
    with Checkpoint(write_checkpoint(tmp_path, tensors, published)) as checkpoint:
        verify(checkpoint, ModelConfig.load(tmp_path))
        assert checkpoint.bytes_read == 0


def test_a_head_beside_tied_embeddings_is_ignored(tmp_path):
    write_checkpoint(tmp_path, tiny_tensors(), tiny_config(tie_word_embeddings=True))
    verify(Checkpoint(tmp_path), ModelConfig.load(tmp_path))


def refuse(tmp_path, tensors, published=None):
    write_checkpoint(tmp_path, tensors, published)
    with pytest.raises(CheckpointError) as refused:
        verify(Checkpoint(tmp_path), ModelConfig.load(tmp_path))
    return str(refused.value)


@pytest.mark.parametrize("fused", [True, False])
def test_every_single_missing_tensor_is_refused_by_name(tmp_path, fused):
    tensors = tiny_tensors(fused=fused)
    some = [n for n in tensors if ".experts." not in n or "layers.1.mlp.experts.5" in n or fused]
    for i, name in enumerate(some):
        message = refuse(tmp_path / str(i), {n: t for n, t in tensors.items() if n != name})
        assert f"no tensor {name} of shape" in message


def test_every_single_misshapen_tensor_is_refused_with_name_and_file(tmp_path):
    tensors = tiny_tensors()
    for i, (name, tensor) in enumerate(tensors.items()):
        message = refuse(tmp_path / str(i), tensors | {name: tensor[..., :-1].contiguous()})
        assert f"model.safetensors: tensor {name} has shape" in message


def test_a_tensor_of_integers_is_refused(tmp_path):
    name = "model.norm.weight"
    message = refuse(tmp_path, tiny_tensors() | {name: torch.zeros(24, dtype=torch.int32)})
    assert f"tensor {name} has dtype torch.int32; supported: bfloat16" in message


def test_tensors_of_another_model_are_refused(tmp_path):
    extra = {"model.layers.2.input_layernorm.weight": torch.zeros(24)}
    message = refuse(tmp_path, tiny_tensors() | extra)
    assert "tensor model.layers.2.input_layernorm.weight belongs to no part" in message


def test_many_problems_are_summed_up(tmp_path):
    message = refuse(tmp_path, {"model.norm.weight": torch.zeros(24)})
    assert message.count("no tensor") == 8
    assert "more" in message


QUANTIZED = {"quant_method": "fp8", "weight_block_size": [7, 6]}
Q = "model.layers.1.self_attn.q_proj.weight"


def fp8_tensors():
    return to_fp8(tiny_tensors(), (7, 6), torch.bfloat16)[0]


def test_fp8_is_accepted_with_its_scales(tmp_path):
    write_checkpoint(tmp_path, fp8_tensors(), tiny_config(quantization_config=QUANTIZED))
    verify(Checkpoint(tmp_path), ModelConfig.load(tmp_path))


@pytest.mark.parametrize(
    ("quantization", "changes", "message"),
    [
        (None, {}, "is FP8, but config.json has no quantization_config"),
        (QUANTIZED, {Q + "_scale_inv": None}, f"tensor {Q} is FP8 without its scales"),
        (QUANTIZED, {Q + "_scale_inv": torch.ones(10, 3)}, f"{Q}_scale_inv have dtype"),
        (QUANTIZED, {Q + "_scale_inv": torch.ones(10, 4).int()}, f"{Q}_scale_inv have dtype"),
        (QUANTIZED, {Q: torch.ones(64, 24)}, f"tensor {Q} has dtype torch.float32 and yet scales"),
        (QUANTIZED | {"weight_block_size": [8, 8]}, {}, "expected bfloat16 or float32 and"),
        (
            QUANTIZED | {"modules_to_not_convert": [Q.removesuffix(".weight")]},
            {},
            f"tensor {Q} is FP8, but modules_to_not_convert names it",
        ),
        (
            QUANTIZED,
            {"model.norm.weight": torch.ones(24).to(torch.float8_e4m3fn)},
            "tensor model.norm.weight is FP8 without its scales",
        ),
    ],
)
def test_fp8_that_does_not_fit_is_refused(tmp_path, quantization, changes, message):
    tensors = {n: t for n, t in (fp8_tensors() | changes).items() if t is not None}
    assert message in refuse(tmp_path, tensors, tiny_config(quantization_config=quantization))


def test_our_reader_agrees_with_the_safetensors_library(tmp_path):
    tensors = fp8_tensors()
    write_checkpoint(tmp_path, tensors)
    theirs = load_file(tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        for name, tensor in theirs.items():
            assert torch.equal(checkpoint.read(name).float(), tensor.float())
