"""What a gateway is said to take is what it takes: caches, and snapshots kept for others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
import torch

from cluster.bodies.gateway import GatewayBody, gateway_options
from cluster.config import validate
from cluster.demo.path import demo_model_path
from tests.unit.harness_checkpoint import tiny_config
from tests.unit.harness_gateway import FakeClock
from workers.gateway.memory import rank_memory, snapshot_demand, store_shortage
from workers.gateway.options import GatewayOptions
from workers.gateway.snapshot import Shard, Stamp, Verdict
from workers.gateway.snapshot_store import SnapshotStore
from workers.model.cache import SequenceCache
from workers.model.config import ModelConfig
from workers.model.shards import pack
from workers.placement import Member, MemberId, MemberState, Placement, Role, View

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "qwen3.5-397b-a17b" / "config.json"
TINY = ModelConfig.from_dict(tiny_config())
OPTIONS = GatewayOptions(max_sequences=3, block_tokens=4, step_tokens=8, context_tokens=48)
sizes = pytest.mark.parametrize("size", [1, 2, 4])  # the KV heads are two


def caches(
    config: ModelConfig, options: GatewayOptions, size: int, device: str
) -> list[SequenceCache]:
    """The caches of all ranks, as `load_rank` makes them."""
    limits = options.scheduler_options(config, size)
    return [
        SequenceCache(
            config, num_kv_blocks=limits.num_kv_blocks, block_tokens=options.block_tokens,
            num_state_blocks=options.max_sequences, num_checkpoints=limits.prefix.num_places,
            tp_size=size, rank=rank, dtype=options.compute_dtype, device=torch.device(device),
        )
        for rank in range(size)
    ]  # fmt: skip


def published() -> ModelConfig:
    if not PUBLISHED.exists():
        pytest.skip("the published files are not beside the repository")
    return ModelConfig.from_dict(json.loads(PUBLISHED.read_text()) | {"quantization_config": None})


@sizes
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_rank_s_caches_take_what_is_said(size, prefix_cache) -> None:
    options = replace(OPTIONS, prefix_cache=prefix_cache, local_experts=True)
    for rank, cache in enumerate(caches(TINY, options, size, "cpu")):
        report = rank_memory(TINY, options, rank=rank, size=size)
        blocks = report.kv_bytes + report.state_bytes + report.checkpoint_bytes
        assert cache.num_bytes == blocks

        for _ in range(2):  # the second step reads what the first one has left
            staged = cache.stage(range(options.max_sequences), [])
            cache.commit()
        assert staged.before.num_bytes + staged.after.num_bytes == report.step_bytes
        assert report.total_bytes - blocks - report.step_bytes == (
            report.weights_bytes + report.experts_bytes
        )


@sizes
def test_the_largest_model_s_caches_take_what_is_said(size) -> None:
    config = published()
    options = GatewayOptions(dtype="bfloat16", context_tokens=131_072, max_sequences=64)
    (cache, *_) = caches(config, options, size, "meta")  # a device without memory
    report = rank_memory(config, options, rank=0, size=size)

    assert cache.num_bytes == report.kv_bytes + report.state_bytes + report.checkpoint_bytes
    demand = snapshot_demand(config, options, size)
    assert (demand.state_bytes, demand.token_bytes) == (192_061_440, 30_720)
    assert (demand.max_sequences, demand.max_tokens) == (64, 64 * 32_768)


def parts(caches: list[SequenceCache], request_id: str, start: int, position: int) -> list[Shard]:
    """What all ranks send of a sequence in the first blocks."""
    stamp = Stamp(
        request_id=request_id, sequence_index=0, assignment=1, position=position,
        weights_version="w", tokens=b"t",
    )  # fmt: skip
    size = len(caches)
    return [
        Shard(
            stamp=stamp,
            owner="g0",
            data=pack(
                cache.copy_aside(0, range(6), start, position), rank=rank, size=size, start=start
            ),
        )
        for rank, cache in enumerate(caches)
    ]


def fill(store: SnapshotStore, ranks: list[SequenceCache], request_id: str) -> Verdict:
    """Keep three snapshots of a sequence; the last one lacks the last rank, if there are others."""
    for start, position in ((0, 5), (5, 9)):
        for shard in parts(ranks, request_id, start, position):
            verdict = store.put(shard)
        assert verdict is Verdict.COMPLETE
    for shard in parts(ranks, request_id, 9, 14)[: max(1, len(ranks) - 1)]:
        verdict = store.put(shard)
    return verdict


@sizes
def test_a_store_holds_as_many_sequences_as_is_said(size) -> None:
    ranks = caches(TINY, OPTIONS, size, "cpu")
    demand = snapshot_demand(TINY, OPTIONS, size)
    store = SnapshotStore(3 * demand.sequence_bytes(14), FakeClock())
    assert demand.num_held(store.budget_bytes, 14) == 3

    for number in range(3):
        before = store.num_bytes
        fill(store, ranks, f"r{number}")
        taken = store.num_bytes - before
        # Of several ranks' third states the last one's part is missing.
        assert demand.sequence_bytes(14) - demand.state_bytes <= taken
        assert taken <= demand.sequence_bytes(14)
        assert size > 1 or taken == demand.sequence_bytes(14)
    assert store.num_evicted == 0
    fill(store, ranks, "r3")
    assert store.num_evicted > 0


@sizes
def test_a_store_that_is_as_large_as_said_lacks_nothing(size) -> None:
    demand = snapshot_demand(TINY, OPTIONS, size)
    enough = demand.fair_store_bytes
    options = replace(OPTIONS, snapshot_tokens=64)

    assert enough - 2**20 < demand.gateway_bytes <= enough
    assert store_shortage(demand, options, enough) == ""
    assert store_shortage(demand, options, demand.gateway_bytes) == ""
    assert store_shortage(demand, OPTIONS, 1) == ""  # which takes no snapshots
    lacking = store_shortage(demand, options, demand.gateway_bytes - 1)
    assert f"Set it to {enough}" in lacking


def test_the_default_store_suffices_for_the_demo_and_not_for_the_largest_model() -> None:
    for model, place, suffices in (
        (ModelConfig.load(demo_model_path()), {}, True),
        (published(), {"num_gpus": 1}, False),
    ):
        config = validate({"gateways": place})
        options = gateway_options(config)
        demand = snapshot_demand(model, options, 1)
        shortage = store_shortage(demand, options, config.gateways.snapshot_store_bytes)
        assert (shortage == "") is suffices
    assert "1.0 GiB has room for 2 of 1,024 tokens each, or 0 of 65,536." in shortage


def test_a_gateway_says_once_that_its_store_is_small_when_there_is_another(capsys) -> None:
    config = validate(
        {"gateways": {"snapshot_store_bytes": 1000}, "experts": {"workers": 0}, "model": {}}
    )
    me, other = MemberId("gateway-0", 1), MemberId("gateway-1", 2)
    body = GatewayBody(me, 0, str(demo_model_path()), "127.0.0.1", config)

    def adopt(version: int, *ids: MemberId) -> str:
        gateways = (
            Member(id=i, role=Role.GATEWAY, state=MemberState.ACTIVE, endpoint="nowhere:1")
            for i in ids
        )
        body.adopt(View(1, version, tuple(gateways), Placement("w", 0, 0)))
        return capsys.readouterr().err

    assert "snapshots" not in adopt(1, me)
    said = json.loads(adopt(2, me, other))
    assert (said["level"], said["member"]) == ("warning", "gateway-0.1")
    assert said["why"].startswith("gateways.snapshot_store_bytes: the 32 sequences that another")
    assert adopt(3, me, other) == ""
    structlog.reset_defaults()
