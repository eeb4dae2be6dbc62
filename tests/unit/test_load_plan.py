"""The loading plan of the full 397B model, from shapes alone: every byte has its owners.

The published shapes lie beside the repository; where they are absent these tests are skipped.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.harness_checkpoint import tiny_config
from workers.model.config import LayerType, ModelConfig
from workers.model.memory import memory_plan
from workers.model.plan import Layout, RankPlan, expert_plan, scale_index, scale_shape

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "qwen3.5-397b-a17b"
PREFIX = "model.language_model."
FUSED = Layout(PREFIX, fused_experts=True)
SPLIT = Layout(PREFIX, fused_experts=False)
SIZES = (1, 2, 4, 8, 16)
GIB = 1 << 30

needs_shapes = pytest.mark.skipif(
    not PUBLISHED.exists(), reason=f"the published shapes are not at {PUBLISHED}"
)
# What every rank holds whole; all else is split over the ranks.
REPLICATED = {
    "norm.weight",
    "layers.N.input_layernorm.weight",
    "layers.N.post_attention_layernorm.weight",
    "layers.N.self_attn.q_norm.weight",
    "layers.N.self_attn.k_norm.weight",
    "layers.N.linear_attn.norm.weight",
    "layers.N.mlp.gate.weight",
    "layers.N.mlp.shared_expert.gate_proj.weight",
    "layers.N.mlp.shared_expert.up_proj.weight",
    "layers.N.mlp.shared_expert.down_proj.weight",
    "layers.N.mlp.shared_expert_gate.weight",
}
KV = {"layers.N.self_attn.k_proj.weight", "layers.N.self_attn.v_proj.weight"}


@pytest.fixture(scope="module")
def config():
    return ModelConfig.load(PUBLISHED)


@pytest.fixture(scope="module")
def expert_pieces(config):
    """The pieces of each expert, by layout."""
    return {
        layout: [
            [p for pieces in expert_plan(config, layout, *expert).values() for p in pieces]
            for expert in itertools.product(range(60), range(512))
        ]
        for layout in (FUSED, SPLIT)
    }


@pytest.fixture(scope="module")
def published_shapes():
    """Shape and number of each published tensor of the text model, by name with N for the layer."""
    shapes = {}
    for line in (PUBLISHED / "tensor-shapes.txt").read_text().splitlines():
        count, name, shape = re.fullmatch(r" *(\d+) x (\S+) \[(.*)\]", line).groups()
        if "visual" not in name:
            shapes[name] = (int(count), tuple(map(int, shape.split(","))))
    return shapes


def general(name):
    return re.sub(r"layers\.\d+\.", "layers.N.", name.removeprefix(PREFIX))


def owners(shape, indices):
    """Number of owners of each cell of the grid that the slices' borders cut a tensor into."""
    borders = [
        sorted({0, n, *(b for i in indices for b in (i[d].start, i[d].stop))})
        for d, n in enumerate(shape)
    ]
    place = [{border: i for i, border in enumerate(axis)} for axis in borders]
    count = np.zeros([len(axis) - 1 for axis in borders], dtype=int)
    for index in indices:
        count[tuple(slice(place[d][s.start], place[d][s.stop]) for d, s in enumerate(index))] += 1
    return count


@needs_shapes
@pytest.mark.parametrize("layout", [FUSED, SPLIT], ids=["fused", "split"])
def test_the_plan_asks_for_exactly_the_published_tensors(
    config, published_shapes, expert_pieces, layout
):
    shapes = {p.tensor: p.shape for p in RankPlan(config=config, layout=layout).pieces()}
    shapes |= {p.tensor: p.shape for pieces in expert_pieces[layout] for p in pieces}
    assert sum(math.prod(shape) for shape in shapes.values()) == 396_346_350_336
    found = Counter((general(name), shape) for name, shape in shapes.items())
    expected = {(general(n), shape): count for n, (count, shape) in published_shapes.items()}
    if layout is SPLIT:  # published by name for the fused layout only
        assert sum(count for (name, _), count in found.items() if ".experts." in name) == 92_160
        found = {key: n for key, n in found.items() if ".experts." not in key[0]}
        expected = {key: n for key, n in expected.items() if ".experts." not in key[0]}
    assert found == expected


@needs_shapes
@pytest.mark.parametrize("size", SIZES)
def test_every_byte_of_a_gateway_has_its_owners(config, size):
    slices = defaultdict(list)
    whole = {}
    for rank in range(size):
        for piece in RankPlan(config=config, layout=FUSED, rank=rank, size=size).pieces():
            slices[piece.tensor].append(piece.index)
            whole[piece.tensor] = piece
    for name, piece in whole.items():
        copies = (
            size if general(name) in REPLICATED else max(1, size // 2) if general(name) in KV else 1
        )
        assert piece.copies == copies, name
        assert np.all(owners(piece.shape, slices[name]) == copies), name
    assert {general(n) for n, p in whole.items() if p.copies == size} >= REPLICATED


@needs_shapes
@pytest.mark.parametrize("size", SIZES)
def test_a_rank_holds_the_kv_head_and_the_key_heads_of_its_own_heads(config, size):
    full = config.layer_types.index(LayerType.FULL)
    for rank in range(size):
        plan = RankPlan(config=config, layout=FUSED, rank=rank, size=size)
        attention = plan.mixer(full)
        heads = range(rank * 32 // size, (rank + 1) * 32 // size)
        (q,), (k,), (o,) = attention["q_gate"], attention["k"], attention["o"]
        assert q.index[0] == slice(heads.start * 512, heads.stop * 512)
        assert o.index[1] == slice(heads.start * 256, heads.stop * 256)
        kv_heads = {head // 16 for head in heads}
        assert k.index[0] == slice(min(kv_heads) * 256, (max(kv_heads) + 1) * 256)
        q_rows, k_rows, v_rows = (piece.index[0] for piece in plan.mixer(0)["qkv"])
        key_heads = {head // 4 for head in range(rank * 64 // size, (rank + 1) * 64 // size)}
        assert q_rows == slice(min(key_heads) * 128, (max(key_heads) + 1) * 128)
        assert k_rows == slice(2048 + q_rows.start, 2048 + q_rows.stop)
        assert v_rows == slice(4096 + rank * 8192 // size, 4096 + (rank + 1) * 8192 // size)


@needs_shapes
@pytest.mark.parametrize("layout", [FUSED, SPLIT], ids=["fused", "split"])
def test_the_experts_together_are_every_byte_of_their_tensors_once(expert_pieces, layout):
    readers = defaultdict(list)
    for pieces in expert_pieces[layout]:
        assert sum(2 * piece.num_elements for piece in pieces) == 24 << 20  # qwen.md 3.2, bfloat16
        for piece in pieces:
            readers[piece.tensor].append(piece)
    for name, pieces in readers.items():
        shape = pieces[0].shape
        assert all(piece.slice_shape[1:] == shape[1:] for piece in pieces), name
        borders = [0] + [piece.index[0].stop for piece in pieces]
        assert [piece.index[0].start for piece in pieces] == borders[:-1], name
        assert borders[-1] == shape[0], name


@needs_shapes
def test_every_expert_has_one_owner_for_any_number_of_workers(config):
    num_experts = 60 * 512
    for num_workers in range(1, 65):
        owners_of = np.zeros(num_experts, dtype=int)
        held = [np.arange(worker, num_experts, num_workers) for worker in range(num_workers)]
        for experts in held:
            owners_of[experts] += 1
        assert np.all(owners_of == 1)
        plan = memory_plan(
            config, tensor_parallel=1, num_workers=num_workers, dtype=torch.bfloat16, spare_slots=0
        )
        assert plan.worker_bytes == tuple(len(experts) * (24 << 20) for experts in held)
        assert sum(plan.worker_bytes) == 773_094_113_280  # 773.1 GB


@needs_shapes
@pytest.mark.parametrize("size", SIZES)
def test_the_scales_of_fp8_cover_each_slice(config, size):
    plain = config.quantization.modules_to_not_convert
    for rank in range(size):
        for piece in RankPlan(config=config, layout=SPLIT, rank=rank, size=size).pieces():
            if len(piece.shape) != 2 or piece.tensor.removesuffix(".weight") in plain:
                continue
            index = scale_index(piece.index, (128, 128))
            shape = scale_shape(piece.shape, (128, 128))
            for part, scale, blocks in zip(piece.index, index, shape, strict=True):
                # Sharding the published model never cuts through a block.
                assert (part.start, part.stop) == (128 * scale.start, 128 * scale.stop)
                assert 0 <= scale.start < scale.stop <= blocks


@needs_shapes
def test_memory_per_rank_is_what_the_architecture_says(config):
    hidden, vocabulary = 4096, 248320
    delta_net = 118e6  # parameters of one mixer, qwen.md 3.1
    attention = 104.9e6
    for size in SIZES:
        plan = memory_plan(config, tensor_parallel=size, num_workers=64, dtype=torch.bfloat16)
        kv_weights = 15 * 2 * 512 * hidden
        kv_copies = kv_weights * (max(1, size // 2) - 1)
        # Gate, shared expert and its gate lie whole on every rank.
        moe = 60 * (512 * hidden + 3 * 1024 * hidden + hidden) * (size - 1)
        expected = 2 * (2 * vocabulary * hidden + 45 * delta_net + 15 * attention + kv_copies + moe)
        expected += 2 * 60 * (512 * hidden + 3 * 1024 * hidden + hidden)
        assert sum(plan.rank_bytes) == pytest.approx(expected, rel=2e-3)
        assert len(set(plan.rank_bytes)) == 1
        assert plan.slot_bytes == 24 << 20
        assert plan.worker_slots == (481,) * 64
        print(f"T={size}: {plan.rank_bytes[0] / GIB:.2f} GiB a rank")
    whole = memory_plan(config, tensor_parallel=1, num_workers=0, dtype=torch.bfloat16)
    float32_extra = 2 * (4096 * 121 + 45 * (64 * 2 + 128) + 15 * 2 * 256)
    assert whole.rank_bytes == (2 * 396_346_350_336 + float32_extra,)
    assert whole.worker_bytes == ()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_vocabulary_that_does_not_divide_is_covered_once_and_padded_at_the_end(size):
    tiny = ModelConfig.from_dict(tiny_config())
    plans = [RankPlan(config=tiny, layout=FUSED, rank=r, size=size) for r in range(size)]
    for field in ("embed", "head"):
        rows = [plan.embedding()[field][0].index for plan in plans]
        assert np.all(owners((50, 24), rows) == 1)
    starts = [plan.vocab_rows for plan in plans]
    assert (
        starts
        == {1: [(0, 50)], 2: [(0, 25), (25, 50)], 4: [(0, 13), (13, 26), (26, 39), (39, 52)]}[size]
    )


def test_a_rank_beyond_a_short_vocabulary_holds_padding_only():
    tiny = ModelConfig.from_dict(tiny_config(vocab_size=9))
    last = RankPlan(config=tiny, layout=FUSED, rank=3, size=4)
    assert last.vocab_rows == (9, 12)
    assert last.embedding()["embed"][0].slice_shape == (0, 24)


def test_replicas_and_spare_slots_are_counted():
    tiny = ModelConfig.from_dict(tiny_config())
    plan = memory_plan(
        tiny, tensor_parallel=2, num_workers=5, dtype=torch.float32, replicas=2, spare_slots=1
    )
    assert plan.worker_slots == (6, 6, 6, 6, 5)  # 2 layers x 6 experts x 2 replicas, and 1 each
    assert plan.slot_bytes == 3 * 24 * 10 * 4
    assert len(plan.rank_bytes) == 2


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["model.embed_tokens.weight"], Layout("model.", fused_experts=True)),
        (["model.language_model.embed_tokens.weight"], FUSED),
        (
            [
                "model.language_model.embed_tokens.weight",
                "model.language_model.layers.0.mlp.experts.0.gate_proj.weight",
            ],
            SPLIT,
        ),
        ([], Layout("model.", fused_experts=True)),
    ],
)
def test_the_layout_is_found_from_names(names, layout):
    assert Layout.find(names) == layout
