"""transformers, experts in process, and experts on two workers over links: one run, one checkpoint.

    python -m tests.bench.bench_engines [--json FILE] [--steps 24] [--size tiny]

Everything runs on this machine in fp32; the order of engines rotates from round to round, and
ratios are of medians within the run. Wall-clock and CPU seconds (of all processes) are both given.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
import transformers
from transformers import DynamicCache, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from tests.bench.harness_workers import expert_workers
from workers.gateway.reference import Reference

CONTEXT = 128
PREFILL = 512
BATCHES = (1, 8, 32)
SIZES = {
    "tiny": {
        "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "small": {
        "vocab_size": 32768, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 4,
        "linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 64,
        "num_experts_per_tok": 8,
    },
}  # fmt: skip

Step = Callable[[int, int, int], None]  # (batch, tokens a sequence, start)


def make_checkpoint(directory: Path, size: str) -> Qwen3_5MoeForCausalLM:
    """Write a random model in the published layout and return it."""
    torch.manual_seed(0)
    section = 11 if size == "small" else 3
    config = Qwen3_5MoeTextConfig(
        **SIZES[size], max_position_embeddings=8192, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
            "mrope_section": [section, section, section - 1], "mrope_interleaved": True,
        },
        eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3_5MoeForCausalLM(config).eval()
    model.save_pretrained(directory, save_original_format=False)
    return model


def of_transformers(model: Qwen3_5MoeForCausalLM) -> Step:
    """Return one step of transformers with its own cache, which is kept between steps."""
    held: dict[str, DynamicCache] = {}

    @torch.inference_mode()
    def step(batch: int, tokens: int, start: int) -> None:
        if start == 0:
            held["cache"] = DynamicCache(config=model.config)
        ids = torch.randint(1, model.config.vocab_size, (batch, tokens))
        output = model(ids, past_key_values=held["cache"], use_cache=True, logits_to_keep=1)
        output.logits.argmax(-1)

    return step


def of_reference(reference: Reference) -> Step:
    """Return one step of our decoder."""

    def step(batch: int, tokens: int, start: int) -> None:
        ids = torch.randint(1, reference.config.vocab_size, (batch, tokens)).tolist()
        logits = reference.step([(i, ids[i], start) for i in range(batch)])
        logits.argmax(-1)

    return step


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children so far."""
    me = psutil.Process()
    times = [p.cpu_times() for p in [me, *me.children(recursive=True)]]
    return sum(t.user + t.system for t in times)


def measure(step: Step, batch: int, num_steps: int) -> dict[str, float]:
    """Time a prefill and then decoding steps; the prefill doubles as the warm-up of decoding."""
    prefill_batch = min(batch, 8)
    step(prefill_batch, PREFILL, 0)
    wall, cpu = time.perf_counter(), cpu_seconds()
    step(prefill_batch, PREFILL, 0)
    prefill_wall, prefill_cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    step(batch, CONTEXT, 0)
    for i in range(3):
        step(batch, 1, CONTEXT + i)
    walls, cpu = [], cpu_seconds()
    for i in range(num_steps):
        wall = time.perf_counter()
        step(batch, 1, CONTEXT + 3 + i)
        walls.append(time.perf_counter() - wall)
    return {
        "prefill_tokens_per_s": prefill_batch * PREFILL / prefill_wall,
        "prefill_tokens_per_cpu_s": prefill_batch * PREFILL / max(prefill_cpu, 1e-9),
        "decode_tokens_per_s": batch / statistics.median(walls),
        "decode_tokens_per_cpu_s": batch * num_steps / max(cpu_seconds() - cpu, 1e-9),
        "decode_step_ms": 1000 * statistics.median(walls),
    }


@contextlib.contextmanager
def engines(size: str, threads: int) -> Iterator[dict[str, Step]]:
    """Build all engines on one checkpoint; the workers are processes of their own."""
    torch.set_num_threads(threads)
    room = max(PREFILL, CONTEXT) + 128
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = make_checkpoint(directory, size)
        local = Reference(directory, context_tokens=room, num_sequences=max(BATCHES))
        with expert_workers(directory, 2) as crew:
            linked = Reference(
                directory,
                context_tokens=room,
                num_sequences=max(BATCHES),
                dispatcher=crew.dispatcher,
            )
            yield {
                "transformers": of_transformers(model),
                "ours, N=0": of_reference(local),
                "ours, N=2": of_reference(linked),
            }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    machine = {
        "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": options.threads,
    }  # fmt: skip
    print(json.dumps(machine))
    rows: dict[tuple[int, str], list[dict[str, float]]] = {}
    with engines(options.size, options.threads) as steps:
        for turn in range(options.rounds):
            names = list(steps)
            for batch in BATCHES:
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    result = measure(steps[name], batch, options.steps)
                    rows.setdefault((batch, name), []).append(result)
    report = {"machine": machine, "size": options.size, "results": [], "ratios": {}}
    medians = {
        key: {m: statistics.median(r[m] for r in results) for m in results[0]}
        for key, results in rows.items()
    }
    for (batch, name), result in medians.items():
        report["results"].append({"batch": batch, "engine": name, **result})
        print(
            f"batch {batch:2d}  {name:13s} prefill {result['prefill_tokens_per_s']:8.0f} tok/s  "
            f"decode {result['decode_tokens_per_s']:8.1f} tok/s "
            f"({result['decode_step_ms']:.2f} ms, "
            f"{result['decode_tokens_per_cpu_s']:.0f} tok/CPU-s)"
        )
    for batch in BATCHES:
        for metric in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            value = {name: medians[batch, name][metric] for name in steps}
            kind = metric.partition("_")[0]
            report["ratios"][f"{kind} batch {batch}"] = ratios = {
                "N=0 / transformers": value["ours, N=0"] / value["transformers"],
                "N=2 / N=0": value["ours, N=2"] / value["ours, N=0"],
            }
            print(f"{kind} batch {batch}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
