"""Our logits are those of transformers' Qwen3_5MoeForCausalLM in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conformance.harness_model import (
    Model,
    assert_close,
    draw_tokens,
    load_model,
    oracle_logits,
    published,
    write_oracle,
)
from workers.model.decoder import DecoderOptions
from workers.model.gate import GateProbe

DEMO = Path(__file__).parents[2] / "cluster" / "demo"


@st.composite
def model_settings(draw: st.DrawFn, size: int = 1) -> dict[str, Any]:
    """Draw a model whose heads `size` ranks can share."""
    kv_heads = draw(st.sampled_from([h for h in (1, 2, 4) if size % h == 0 or h % size == 0]))
    heads = draw(st.sampled_from([h for h in (4, 8) if h % kv_heads == 0]))
    key_heads = size * draw(st.sampled_from([1, 2]))
    num_experts = draw(st.integers(1, 13))
    pattern = draw(
        st.lists(st.sampled_from(["linear_attention", "full_attention"]), min_size=1, max_size=4)
    )
    rope = {
        "rope_type": "default",
        "rope_theta": draw(st.sampled_from([1000.0, 1e7])),
        "partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0])),
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    if draw(st.booleans()):
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return published(
        vocab_size=draw(st.integers(90, 130)),
        hidden_size=draw(st.sampled_from([32, 40])),
        num_hidden_layers=len(pattern),
        layer_types=pattern,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 24])),
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * draw(st.sampled_from([1, 2, 3])),
        linear_key_head_dim=draw(st.sampled_from([8, 12])),
        linear_value_head_dim=draw(st.sampled_from([8, 20])),
        linear_conv_kernel_dim=draw(st.integers(2, 4)),
        num_experts=num_experts,
        num_experts_per_tok=draw(st.integers(1, num_experts)),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters=rope,
    )


def check(model: Model, expected: torch.Tensor, token_ids: list[int]) -> None:
    """Compare one pass, chunks, and token by token."""
    n = len(token_ids)
    for cuts in ([n], [1, 64, 5, n - 70], [n - 20] + [1] * 20):
        assert_close(model.run(token_ids, cuts), expected)


@pytest.mark.parametrize("seed", range(2))
def test_logits_equal_those_of_transformers(tmp_path: Path, seed: int) -> None:
    oracle = write_oracle(tmp_path, published(), seed)
    token_ids = draw_tokens(150, 301, seed)
    model = load_model(tmp_path)

    check(model, oracle_logits(oracle, token_ids), token_ids)


def test_logits_equal_token_by_token_from_the_first(tmp_path: Path) -> None:
    oracle = write_oracle(tmp_path, published())
    token_ids = draw_tokens(80, 301)

    assert_close(load_model(tmp_path).run(token_ids, [1] * 80), oracle_logits(oracle, token_ids))


@given(data=st.data())
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_supported_model_equals_transformers(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    drawn = data.draw(model_settings())
    directory = tmp_path_factory.mktemp("model")
    oracle = write_oracle(directory, drawn)
    token_ids = draw_tokens(100, drawn["vocab_size"])

    check(load_model(directory), oracle_logits(oracle, token_ids), token_ids)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_sequences_served_together_equal_each_alone(tmp_path: Path, micro_batches: int) -> None:
    """Prefill chunks and decoded tokens of sequences of several lengths share every step."""
    oracle = write_oracle(tmp_path, published())
    model = load_model(tmp_path, options=DecoderOptions(micro_batches=micro_batches))
    prompts = [draw_tokens(n, 301, n) for n in (3, 17, 64, 100, 130, 31)]
    chunk = [2, 17, 30, 100, 65, 1]
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(model.lengths.get(i, 0) < len(p) for i, p in enumerate(prompts)):
        work = []
        for i, prompt in enumerate(prompts):
            done = model.lengths.get(i, 0)
            take = chunk[i] if done < len(prompt) - 12 else 1
            if done < len(prompt):
                work.append((i, prompt[done : done + take]))
        for (i, _), logits in zip(work, model.step(*work), strict=True):
            parts[i].append(logits)

    for prompt, part in zip(prompts, parts, strict=True):
        assert_close(torch.cat(part), oracle_logits(oracle, prompt))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_probe_sees_the_gate_margins_of_transformers(
    tmp_path: Path, micro_batches: int
) -> None:
    oracle = write_oracle(tmp_path, published())
    probe = GateProbe(num_layers=4)
    model = load_model(tmp_path, options=DecoderOptions(micro_batches=micro_batches), probe=probe)
    prompts = [draw_tokens(n, 301, n) for n in (9, 1, 20)]

    model.step(*enumerate(prompts))

    row = 0
    for prompt in prompts:
        with torch.no_grad():
            output = oracle(torch.tensor(prompt)[None], use_cache=False, output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            best = logits.float().softmax(-1).topk(4, -1).values
            margins = probe.margins_LN[layer, row : row + len(prompt)]
            torch.testing.assert_close(margins, best[:, 2] - best[:, 3], atol=1e-5, rtol=1e-4)
        row += len(prompt)


@pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="no demo checkpoint here")
def test_the_demo_model_equals_transformers() -> None:
    from transformers import Qwen3_5MoeForCausalLM

    oracle = Qwen3_5MoeForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    token_ids = draw_tokens(150, 4096)
    model = load_model(DEMO)

    check(model, oracle_logits(oracle, token_ids), token_ids)
