"""A long context in chunks: what a decoded token costs on the way, by kind of layer.

    python -m tests.accept.long_context [--tokens 110000] [--json FILE] [--plot FILE]

A tiny random model with YaRN takes in one sequence chunk by chunk, on one CPU thread. At growing
lengths a token is decoded several times, each time to be discarded, and the mixers of every layer
are timed apart: those of linear layers must cost the same all along, those of full attention grow.
Then the same tokens are taken in by chunks of another size, and the last logits compared.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import orjson
import torch

from tests.conformance.harness_model import (
    TOLERANCE,
    Model,
    draw_tokens,
    load_model,
    published,
    write_oracle,
)
from workers.gateway.kv import blocks_for
from workers.model.attention import GatedAttention
from workers.model.batch import Segment, StepBatch
from workers.model.cache import kv_bytes_per_token, state_bytes_per_sequence

REPEATS = 41
FLAT = 1.5  # times the cost at the shortest length; a noisy machine is worse than this alone
VOCAB_SIZE = 301
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
    "factor": 4.0,
    "original_max_position_embeddings": 262_144,
}


class Times:
    """Sums the seconds that mixers take, by kind of layer, in processor time."""

    def __init__(self, model: Model) -> None:
        self.spent_s: dict[str, float] = defaultdict(float)
        for layer in model.decoder._layers:
            kind = "full" if isinstance(layer.mixer, GatedAttention) else "linear"
            layer.mixer.forward = self._timed(layer.mixer.forward, kind)

    def _timed(self, forward: Any, kind: str) -> Any:
        def run(*arguments: Any) -> Any:
            started_s = time.thread_time()
            result = forward(*arguments)
            self.spent_s[kind] += time.thread_time() - started_s
            return result

        return run


def segment_of(model: Model, start: int, token_ids: list[int]) -> Segment:
    return Segment(
        token_ids=tuple(token_ids),
        start=start,
        state_block=0,
        kv_blocks=tuple(range(blocks_for(start + len(token_ids), model.cache.block_tokens))),
    )


def decode_ms(model: Model, times: Times, position: int) -> dict[str, float]:
    """Return the median milliseconds of one decoded token, by kind of layer; nothing is kept."""
    batch = StepBatch(segments=(segment_of(model, position, [5]),))
    seen: dict[str, list[float]] = defaultdict(list)
    for _ in range(REPEATS):
        times.spent_s.clear()
        model.decoder.forward(batch, model.cache)
        model.cache.discard()
        for kind, spent_s in times.spent_s.items():
            seen[kind].append(1000 * spent_s)
    return {kind: round(statistics.median(values), 4) for kind, values in seen.items()}


def take_in(
    model: Model, token_ids: list[int], chunk: int, stops: list[int], times: Times | None
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Compute all tokens in chunks; returns what decoding cost at stops, and the last logits."""
    points, position, left = [], 0, list(stops)
    logits = torch.empty(0)
    while position < len(token_ids):
        end = min(position + chunk, len(token_ids), *left[:1])
        segment = segment_of(model, position, token_ids[position:end])
        logits = model.decoder.forward(StepBatch(segments=(segment,)), model.cache)
        model.cache.commit()
        position = end
        if left and position == left[0]:
            left.pop(0)
            if times is not None:
                points.append({"tokens": position, "decode_ms": decode_ms(model, times, position)})
                print(points[-1], flush=True)
    return points, logits[-1]


def plot(points: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lengths = [point["tokens"] for point in points]
    for kind in ("linear", "full"):
        costs = [point["decode_ms"][kind] for point in points]
        axes.plot(lengths, costs, marker="o", label=f"{kind} layers")
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("one decoded token, ms of processor time")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=110_000)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--other-chunk", type=int, default=448)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    token_ids = draw_tokens(options.tokens, VOCAB_SIZE)
    steps = int(math.log2(options.tokens / 1024))
    stops = [1024 * 2**i for i in range(steps + 1)] + [options.tokens]
    with tempfile.TemporaryDirectory() as directory:
        settings = published(max_position_embeddings=1_048_576, rope_parameters=YARN)
        write_oracle(Path(directory), settings)
        sizes = {"num_sequences": 1, "max_tokens": options.tokens + 1}
        model = load_model(Path(directory), **sizes)
        started_s = time.perf_counter()
        points, logits = take_in(model, token_ids, options.chunk, stops, Times(model))
        took_s = time.perf_counter() - started_s
        num_bytes = model.cache.num_bytes
        other = load_model(Path(directory), **sizes)
        _, other_logits = take_in(other, token_ids, options.other_chunk, [], None)

    config = model.config
    blocks = blocks_for(options.tokens + 1, model.cache.block_tokens)
    expected_bytes = state_bytes_per_sequence(config, 1)
    expected_bytes += blocks * model.cache.block_tokens * kv_bytes_per_token(config, 1)
    linear = [point["decode_ms"]["linear"] for point in points]
    full = [point["decode_ms"]["full"] for point in points]
    gap = (logits - other_logits).abs().max().item() / logits.abs().max().item()
    report = {
        "tokens": options.tokens,
        "chunk_tokens": options.chunk,
        "seconds": round(took_s, 1),
        "points": points,
        "linear_most_by_first": round(max(linear) / linear[0], 2),
        "full_last_by_first": round(full[-1] / full[0], 2),
        "cache_bytes": num_bytes,
        "cache_bytes_expected": expected_bytes,
        "logit_gap_to_other_chunks": gap,
        "passed": max(linear) / linear[0] < FLAT
        and num_bytes == expected_bytes
        and gap < TOLERANCE
        and bool(logits.argmax() == other_logits.argmax()),
    }
    print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    if options.plot:
        plot(points, options.plot)
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
