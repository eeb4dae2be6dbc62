"""`expertmesh check`: what a configuration would need, without starting anything."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster.app import ModelFacts, check_startable, desired_of, floor_of
from cluster.config import ClusterConfig
from cluster.serving import model_directory, model_facts
from workers.errors import ExpertmeshError
from workers.gateway.reference import Reference
from workers.model.cache import kv_bytes_per_token, state_bytes_per_sequence
from workers.model.checkpoint import Checkpoint
from workers.model.config import LayerType, ModelConfig
from workers.model.memory import memory_plan

_PARITY_TOKENS = 48
_PARITY_BOUND = 1e-4
_PARITY_MAX_BYTES = 4 * 2**30  # transformers and we each hold the model in float32


def check_command(config: ClusterConfig, *, parity: bool) -> None:
    """Check checkpoint and configuration, print memory per role, compare logits where possible.

    Raises:
        CheckpointError: The model is unsupported, incomplete or damaged.
        ExpertmeshError: The logits differ from those of transformers by more than the bound.
    """
    console = Console()
    facts = model_facts(config)
    check_startable(config, facts)
    directory = model_directory(config)
    model = ModelConfig.load(directory)
    linear = model.layer_types.count(LayerType.LINEAR)
    console.print(
        f"{facts.name}: {linear} linear and {model.num_layers - linear} full attention layers, "
        f"{model.num_experts} experts of which {model.num_experts_per_token} serve a token, "
        f"weights {facts.weights_version}",
        highlight=False,
    )
    console.print(_memory_table(model, config, facts))
    if parity:
        _check_parity(console, directory, model)


def _memory_table(model: ModelConfig, config: ClusterConfig, facts: ModelFacts) -> Table:
    ranks, workers = config.gateways.tensor_parallel, config.experts.workers
    dtype = getattr(torch, config.compute_dtype)
    context = config.gateways.context_tokens or model.max_position_embeddings
    table = Table(title=f"memory in {dtype}", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    plan = memory_plan(model, tensor_parallel=ranks, num_workers=workers, dtype=dtype)
    table.add_row(f"weights of one of {ranks} gateway ranks", _size(max(plan.rank_bytes)))
    table.add_row("one expert, which is a slot", _size(plan.slot_bytes))
    for what, slots in _workers_rows(config, facts):
        table.add_row(what, _size(slots * plan.slot_bytes))
    kv = kv_bytes_per_token(model, ranks, dtype)
    table.add_row("KV of one token on one rank", _size(kv))
    table.add_row("recurrent state of one sequence on one rank",
                  _size(state_bytes_per_sequence(model, ranks, dtype)))  # fmt: skip
    table.add_row(f"KV of a full context of {context} tokens on one rank", _size(kv * context))
    return table


def _workers_rows(config: ClusterConfig, facts: ModelFacts) -> Iterator[tuple[str, int]]:
    """Yield, for one and two copies of each expert and for the wanted ones, a worker's slots."""
    workers, wanted = config.experts.workers, floor_of(config, facts)
    for floor in sorted({1, 2, wanted}) if workers else ():
        experts = config.experts.model_copy(update={"floor": floor})
        slots = desired_of(config.model_copy(update={"experts": experts}), facts).num_slots
        copies = "1 copy" if floor == 1 else f"{floor} copies"
        what = f"one of {workers} expert workers, {copies} of each expert: {slots} slots"
        if floor == wanted:
            what += ", as configured"
            if floor > workers // config.control.cells:
                what += "; no two copies go to one worker, so there will be fewer"
        yield what, slots
    for pool, slots in config.experts.pool_slots.items() if workers else ():
        yield f"an expert worker in pool {pool}: {slots} slots", slots


def _check_parity(console: Console, directory: Path, model: ModelConfig) -> None:
    if importlib.util.find_spec("transformers") is None:
        console.print("parity: not checked, transformers is not installed")
        return
    with Checkpoint(directory) as checkpoint:
        parameters = sum(t.num_bytes for t in checkpoint.tensors.values())
        if parameters > _PARITY_MAX_BYTES:
            console.print("parity: not checked, the checkpoint is too large to load twice")
            return
    from transformers import Qwen3_5MoeForCausalLM

    reference = Reference(directory, context_tokens=_PARITY_TOKENS)
    oracle = Qwen3_5MoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
    oracle.train(mode=False)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (_PARITY_TOKENS,), generator=draw)
    ours = reference.step([(0, ids.tolist(), 0)], num_logits=_PARITY_TOKENS)
    with torch.no_grad():
        theirs = oracle(ids[None], use_cache=False).logits[0]
    scale = float(theirs.abs().max())
    difference = float((ours - theirs).abs().max()) / scale
    verdict = f"{difference:.1e} of the logit scale {scale:.2f} (bound {_PARITY_BOUND:.0e})"
    if difference > _PARITY_BOUND:
        raise ExpertmeshError(f"logits differ from transformers' by {verdict}")
    console.print(f"parity: logits differ from transformers' by {verdict}", highlight=False)


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num_bytes:,} ({size:.1f} {unit})" if unit != "B" else f"{num_bytes:,}"
