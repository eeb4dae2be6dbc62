"""`expertmesh check`: what a configuration would need, without starting anything."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster.app import ModelFacts, check_startable, desired_of, floor_of
from cluster.bodies.gateway import gateway_options
from cluster.config import ClusterConfig
from cluster.serving import model_directory, model_facts
from workers.errors import ExpertmeshError
from workers.gateway.memory import (
    MemoryReport,
    SnapshotDemand,
    rank_memory,
    readable,
    snapshot_demand,
    store_shortage,
)
from workers.gateway.options import GatewayOptions
from workers.gateway.reference import Reference
from workers.model.cache import kv_bytes_per_token, state_bytes_per_sequence
from workers.model.checkpoint import Checkpoint
from workers.model.config import LayerType, ModelConfig
from workers.model.memory import memory_plan

_SNAPSHOT_TOKENS = (1024, 8192)  # of sequences whose snapshots are counted, beside a context
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
    print_gateway(console, model, config)
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


def print_gateway(console: Console, model: ModelConfig, config: ClusterConfig) -> None:
    """Print what a gateway takes and keeps for others, and what it cannot keep."""
    options, size = gateway_options(config), config.gateways.tensor_parallel
    reports = [rank_memory(model, options, rank=rank, size=size) for rank in range(size)]
    demand = snapshot_demand(model, options, size)
    store_bytes = config.gateways.snapshot_store_bytes
    console.print(_rank_table(max(reports, key=lambda r: r.total_bytes), demand, options, size))
    if options.snapshot_tokens:
        context = options.context_of(model)
        console.print(_snapshot_table(demand, store_bytes, context))
    if shortage := store_shortage(demand, options, store_bytes):
        most = max(config.gateways.count, config.autoscaler.gateways.max)
        when = "warning" if most > 1 else "with a second gateway"
        console.print(f"{when}: {shortage}.", highlight=False, markup=False)


def _rank_table(
    report: MemoryReport, demand: SnapshotDemand, options: GatewayOptions, size: int
) -> Table:
    table = Table(title=f"one of {size} ranks of a gateway, at most", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    sequences = demand.max_sequences
    place = ", in host memory" if options.prefix_states_on_host else ""
    for what, num_bytes in (
        ("weights", report.weights_bytes),
        ("routed experts", report.experts_bytes),
        (f"KV of {demand.max_tokens:,} tokens, those of the prefix cache too", report.kv_bytes),
        (f"recurrent states of {sequences:,} sequences", report.state_bytes),
        ("copies of these during a step", report.step_bytes),
        (f"states that the prefix cache keeps{place}", report.checkpoint_bytes),
        ("all of it; messages, activations and libraries come on top", report.total_bytes),
    ):
        if num_bytes:
            table.add_row(what, _size(num_bytes))
    return table


def _snapshot_table(demand: SnapshotDemand, store_bytes: int, context: int) -> Table:
    """Return what snapshots take at the gateway that keeps them, in host memory."""
    table = Table(title="snapshots, kept by another gateway in host memory", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column(f"held in {readable(store_bytes)}", justify="right")
    table.add_row("recurrent states of one sequence, once", _size(demand.state_bytes), "")
    table.add_row("KV of one token", _size(demand.token_bytes), "")
    lengths = sorted({context, *(n for n in _SNAPSHOT_TOKENS if n < context)})
    for tokens in lengths:
        what = f"a sequence of {tokens:,} tokens, its states {demand.num_copies} times"
        num_held = demand.num_held(store_bytes, tokens)
        table.add_row(what, _size(demand.sequence_bytes(tokens)), f"{num_held:,}")
    what = f"all that one gateway runs: {demand.max_sequences:,} sequences and all KV"
    is_held = "yes" if store_bytes >= demand.gateway_bytes else "no"
    table.add_row(what, _size(demand.gateway_bytes), is_held)
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
    return f"{num_bytes:,} ({readable(num_bytes)})" if num_bytes >= 1024 else f"{num_bytes:,}"
