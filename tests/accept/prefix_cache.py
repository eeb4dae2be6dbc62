"""Conversations with the prefix cache on and off: the same tokens, and what it saves.

    python -m tests.accept.prefix_cache [--sizes 1 2] [--json FILE]

Three traces, each greedy and seeded: turns of one conversation, branches from each turn, and many
questions behind one system prompt. Every request runs on real ranks of the shipped model, with the
cache off and on. In bit-stable mode the tokens must be equal; else every one must be right by
teacher forcing.

What is saved is set beside what vLLM's align mode would save of the same requests, and once more
for longer traces that only the scheduler runs, at block sizes of the published 397B model.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from tests.ranks.harness_gateway import DEMO_MODEL, Answer, Gateway, Reference, options_for
from workers.gateway.prefix_cache import PrefixOptions
from workers.gateway.scheduler import Scheduler, SchedulerOptions
from workers.gateway.sequence import Sequence as RunningSequence
from workers.model.cache import kv_bytes_per_token, state_bytes_per_sequence
from workers.model.config import LayerType, ModelConfig
from workers.types import FinishReason, Request, Sampling, Stopping

GREEDY = Sampling(temperature=0.0)
SEEDED = Sampling(temperature=0.8, top_k=30, seed=11)
ALIGN_397B = {"T=1": 2096, "T=4": 1056, "T=8": 528, "T=16": 272}  # tokens of a block
Serve = Callable[[Request], tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Tokens of a trace's parts."""

    system: int
    question: int
    answer: int
    turns: int
    branches: int
    others: int


DEMO = Sizes(system=150, question=12, answer=70, turns=3, branches=2, others=5)
LONG = Sizes(system=3000, question=300, answer=500, turns=8, branches=3, others=40)


@dataclass(frozen=True)
class Served:
    """A request as it went: what was asked and what came."""

    request: Request
    answer: tuple[int, ...]


def draw(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 4000, (count,), generator=generator).tolist())


def run_traces(serve: Serve, sizes: Sizes) -> dict[str, list[Served]]:
    """Run every trace, one request after the other, each trace over a system prompt of its own."""
    traces: dict[str, list[Served]] = {}
    for number, (name, sampling) in enumerate((("greedy", GREEDY), ("seeded", SEEDED))):

        def ask(
            trace: str,
            prompt: tuple[int, ...],
            length: int,
            name: str = name,
            s: Sampling = sampling,
        ) -> tuple[int, ...]:
            served = traces.setdefault(f"{trace}, {name}", [])
            request = Request(
                request_id=f"{trace}-{name}-{len(served)}",
                prompt_token_ids=prompt,
                sampling=s,
                stopping=Stopping(max_tokens=length),
            )
            served.append(Served(request, serve(request)))
            return served[-1].answer

        seed = 1000 * number
        history = draw(sizes.system, seed)
        for turn in range(sizes.turns):
            asked = history + draw(sizes.question, seed + 10 + turn)
            history = asked + ask("turns", asked, sizes.answer)
        history = draw(sizes.system, seed + 1)
        for turn in range(sizes.turns):
            for branch in range(sizes.branches):
                asked = history + draw(sizes.question, seed + 100 + 10 * turn + branch)
                answer = ask("branches", asked, sizes.answer // 2)
            history = asked + answer
        system = draw(sizes.system, seed + 2)
        for other in range(sizes.others):
            question = draw(sizes.question, seed + 200 + other)
            ask("shared system prompt", system + question, sizes.question)
    return traces


def saved_by_align(served: Iterable[Served], block_tokens: int, *, keep_all: bool) -> list[int]:
    """Return the prompt tokens that vLLM's align mode would find of each request.

    A state is found at a block's end only, and only with the KV of all blocks before it. States are
    kept at the last block's end of a prompt and of a completion, and where a prompt leaves one that
    was seen before; with `keep_all` at the end of every block. Nothing is ever evicted.

    Source: vLLM 0.33, v1/core/sched/scheduler.py and v1/core/single_type_kv_cache_manager.py.
    """
    kv: set[tuple[int, ...]] = set()
    states: set[tuple[int, ...]] = set()
    found = []
    for one in served:
        prompt = one.request.prompt_token_ids
        tokens = (*prompt, *one.answer)[:-1]

        def ends(num_tokens: int) -> range:
            return range(block_tokens, num_tokens + 1, block_tokens)

        shared = max((e for e in ends(len(prompt) - 1) if prompt[:e] in kv), default=0)
        hit = max((e for e in ends(shared) if prompt[:e] in states), default=0)
        found.append(hit)
        last = (len(prompt) - 1) // block_tokens * block_tokens
        wanted: Sequence[int] = (shared, last, len(tokens) // block_tokens * block_tokens)
        states |= {tokens[:end] for end in (ends(len(tokens)) if keep_all else wanted) if end}
        kv |= {tokens[:end] for end in ends(len(tokens))}
    return found


def align_block_tokens(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the block size that align mode takes: KV of a layer at least as big as a state of one.

    In steps of 16 tokens.
    """
    num_full = config.layer_types.count(LayerType.FULL)
    kv = kv_bytes_per_token(config, 1, dtype) // num_full
    state = state_bytes_per_sequence(config, 1, dtype) // (config.num_layers - num_full)
    return 16 * math.ceil(state / kv / 16)


def on_ranks(size: int, *, bit_stable: bool, is_on: bool) -> tuple[dict[str, list[Served]], Any]:
    """Run the traces on a gateway; returns them and its statistics."""
    options = options_for(
        num_kv_blocks=300, context_tokens=640, bit_stable=bit_stable, prefix_cache=is_on
    )
    gateway = Gateway(size, options)
    gateway.start()
    rank = gateway.ranks[0]

    def serve(request: Request) -> tuple[int, ...]:
        return tuple(rank("generate", [request])[request.request_id, 0].token_ids)

    try:
        return run_traces(serve, DEMO), rank("call", "stats")
    finally:
        gateway.close()


def compare_on_ranks(size: int, *, bit_stable: bool, reference: Reference) -> dict[str, Any]:
    """Run with the cache off and on, and check the tokens."""
    off, _ = on_ranks(size, bit_stable=bit_stable, is_on=False)
    on, stats = on_ranks(size, bit_stable=bit_stable, is_on=True)
    served = [one for trace in on.values() for one in trace]
    plain = [one for trace in off.values() for one in trace]
    same = sum(a == b for a, b in zip(served, plain, strict=True))
    answers = {
        (one.request.request_id, 0): Answer(one.answer, FinishReason.LENGTH) for one in served
    }
    reports = reference.check([one.request for one in served], answers)  # raises at a wrong token
    block_tokens = align_block_tokens(ModelConfig.load(DEMO_MODEL), torch.float32)
    return {
        "ranks": size,
        "bit_stable": bit_stable,
        "requests": len(served),
        "equal_to_cache_off": same,
        "near_ties": sum(len(report.mismatches) for report in reports),
        **savings(served, stats.prefix_hits, stats.prefix_hit_tokens, block_tokens),
        "passed": (same == len(served) or not bit_stable) and stats.prefix_hits > 0,
    }


def savings(served: list[Served], hits: int, hit_tokens: int, block_tokens: int) -> dict[str, Any]:
    """Set what was saved beside what align mode would save."""
    prompts = sum(len(one.request.prompt_token_ids) for one in served)
    some = saved_by_align(served, block_tokens, keep_all=False)
    most = saved_by_align(served, block_tokens, keep_all=True)
    return {
        "prompt_tokens": prompts,
        "hits": hits,
        "saved_tokens": hit_tokens,
        "saved_share": round(hit_tokens / prompts, 3),
        "align": {
            "block_tokens": block_tokens,
            "hits": sum(map(bool, some)),
            "saved_tokens": sum(some),
            "saved_share": round(sum(some) / prompts, 3),
            "saved_share_keeping_all_states": round(sum(most) / prompts, 3),
        },
    }


def schedule_only(places: int) -> tuple[list[Served], Scheduler]:
    """Run the long traces through the scheduler alone: completions are drawn."""
    scheduler = Scheduler(
        SchedulerOptions(
            step_tokens=8192,
            max_sequences=8,
            block_tokens=16,
            num_kv_blocks=40_000,
            prefix=PrefixOptions(num_places=places),
        )
    )

    def serve(request: Request) -> tuple[int, ...]:
        answer = draw(request.stopping.max_tokens, sum(request.prompt_token_ids))
        sequence = RunningSequence(request, 0, 0)
        scheduler.add(sequence)
        while sequence.finish is None:
            for work in scheduler.schedule():
                token = None
                if sequence.samples(work.segment):
                    token = answer[sequence.num_completion]
                reason = sequence.commit(work.segment, [], token)
                scheduler.advanced(sequence)
                if reason is not None:
                    scheduler.finish(sequence, reason)
        return answer

    traces = run_traces(serve, LONG)
    return [one for trace in traces.values() for one in trace], scheduler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--places", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    served, scheduler = schedule_only(options.places)
    counters = scheduler.prefixes.counters
    long_traces = {
        f"397B, {ranks}": savings(served, counters.hits, counters.hit_tokens, block_tokens)
        for ranks, block_tokens in ALIGN_397B.items()
    }
    runs = []
    for bit_stable in (True, False):
        reference = Reference(bit_stable=bit_stable)
        for size in options.sizes:
            runs.append(compare_on_ranks(size, bit_stable=bit_stable, reference=reference))
            print(orjson.dumps(runs[-1], option=orjson.OPT_INDENT_2).decode(), flush=True)
    report = {
        "model": str(DEMO_MODEL.name),
        "on_ranks": runs,
        "schedule_only": {"places": options.places, "requests": len(served), **long_traces},
        "passed": all(run["passed"] for run in runs),
    }
    print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
