"""The examples' GPUs hold what is put on them, by the arithmetic of `expertmesh check`."""

import json
import re

import pytest
import torch
import yaml

from cluster.app import ModelFacts, desired_of
from cluster.bodies.gateway import gateway_options
from cluster.config import validate
from tests.helm.harness_helm import EXAMPLES, ROOT, manifests, named, template
from workers.gateway.memory import rank_memory, snapshot_demand, store_shortage
from workers.model.config import ModelConfig
from workers.model.memory import expert_bytes, memory_plan

_MIB = 2**20
GIB = 2**30
PROCESS_BYTES = 4 * GIB  # of a rank in host memory: libraries, buffers of links, CUDA's own
GPU_BYTES = {"h100": 81_559 * _MIB, "h200": 143_771 * _MIB}  # as nvidia-smi reports them
FILL = 0.85  # the rest is for messages, activations, kernels and the driver
PUBLISHED = ROOT.parent / "shared" / "data" / "qwen3.5-397b-a17b" / "config.json"

_COMMON = {
    "architectures": ["Qwen3_5MoeForCausalLM"], "vocab_size": 248320, "num_key_value_heads": 2,
    "head_dim": 256, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144, "full_attention_interval": 4, "eos_token_id": 248044,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}  # fmt: skip
MODELS = {
    "397b": ModelConfig.from_dict({
        **_COMMON, "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32,
        "linear_num_value_heads": 64, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024,
    }),
    "122b": ModelConfig.from_dict({
        **_COMMON, "hidden_size": 3072, "num_hidden_layers": 48, "num_attention_heads": 32,
        "linear_num_value_heads": 64, "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024,
    }),
    "35b": ModelConfig.from_dict({
        **_COMMON, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
        "linear_num_value_heads": 32, "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    }),
}  # fmt: skip
PARAMETERS = {"397b": 396_346_350_336, "122b": 122_111_526_912, "35b": 34_660_610_688}
CASES = {"production-397b": "397b", "one-node-122b": "122b", "air-gapped": "35b"}
cases = pytest.mark.parametrize("stem", CASES)


def example(stem):
    (path,) = [path for path in EXAMPLES if path.stem == stem]
    found = manifests(template(files=[path]))
    text = named(found, "ConfigMap", "-expertmesh")["data"]["config.yaml"]
    groups = named(found, "RayCluster")["spec"]["workerGroupSpecs"]
    return validate(yaml.safe_load(text)), groups, MODELS[CASES[stem]]


def gib(quantity):
    """Return the bytes of a quantity in Gi."""
    return int(quantity.removesuffix("Gi")) * GIB


def gpus_of(groups, role):
    """Return the GPU of every group of a role; 80 GB where the group does not say."""
    mine = [group["groupName"] for group in groups if group["groupName"].startswith(role)]
    return {name: GPU_BYTES.get(name.rpartition("-")[2], GPU_BYTES["h100"]) for name in mine}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_have_as_many_parameters_as_published(name):
    plan = memory_plan(MODELS[name], tensor_parallel=1, num_workers=0, dtype=torch.bfloat16)

    assert sum(plan.rank_bytes) == pytest.approx(2 * PARAMETERS[name], rel=1e-4)


def test_the_largest_model_is_the_published_one():
    if not PUBLISHED.exists():
        pytest.skip("the published configuration is not beside this checkout")

    assert MODELS["397b"] == ModelConfig.from_dict(
        {**json.loads(PUBLISHED.read_text()), "quantization_config": None}
    )


@cases
def test_an_expert_worker_s_slots_fit_into_its_gpu(stem):
    config, groups, model = example(stem)
    slot = expert_bytes(model, torch.bfloat16)
    facts = ModelFacts(
        directory="", name=stem, num_layers=model.num_layers, num_experts=model.num_experts,
        weights_version="1", experts_bytes=slot * model.num_layers * model.num_experts,
    )  # fmt: skip
    desired = desired_of(config, facts)
    plan = memory_plan(
        model, tensor_parallel=config.gateways.tensor_parallel, num_workers=config.experts.workers,
        dtype=torch.bfloat16, replicas=config.experts.floor,
    )  # fmt: skip

    assert config.experts.floor == desired.floor == 2
    assert desired.num_slots * config.experts.workers >= 2 * model.num_layers * model.num_experts
    assert max(plan.worker_slots) <= desired.num_slots
    for name, gpu in gpus_of(groups, "expert").items():
        used = config.experts.pool_slots.get(name, desired.num_slots) * slot
        assert used <= FILL * gpu, f"{name}: {used / 2**30:.1f} GiB of {gpu / 2**30:.1f}"
    assert config.experts.pool_slots.keys() <= gpus_of(groups, "expert").keys()


@cases
def test_a_gateway_s_weights_caches_and_states_fit_into_its_gpus(stem):
    config, groups, model = example(stem)
    options, size = gateway_options(config), config.gateways.tensor_parallel
    assert options.compute_dtype is torch.bfloat16
    used = max(
        rank_memory(model, options, rank=rank, size=size).total_bytes for rank in range(size)
    )
    for name, gpu in gpus_of(groups, "gateway").items():
        assert used <= FILL * gpu, f"{name}: {used / 2**30:.1f} GiB of {gpu / 2**30:.1f}"


def test_a_gateway_s_pod_has_memory_for_the_snapshots_of_another_gateway():
    config, groups, model = example("production-397b")
    options, size = gateway_options(config), config.gateways.tensor_parallel
    demand = snapshot_demand(model, options, size)
    store = config.gateways.snapshot_store_bytes
    assert store_shortage(demand, options, store) == ""
    for group in groups:
        if not group["groupName"].startswith("gateway"):
            continue
        pod = group["template"]["spec"]
        (shm,) = [v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "dshm"]
        restored = demand.max_tokens * demand.token_bytes  # until their sequences are admitted
        processes = size * PROCESS_BYTES
        least = store + restored + processes + gib(shm)
        assert gib(pod["containers"][0]["resources"]["requests"]["memory"]) >= least


def test_the_operator_s_page_says_what_is_computed():
    page = (ROOT / "docs" / "operations.md").read_text().split("## Memory of a gateway")[1]
    rows = re.findall(r"^\| (.+?) \| .+ \| ([\d.]+) GiB \|$", page, re.MULTILINE)
    config, _, model = example("production-397b")
    options, size = gateway_options(config), config.gateways.tensor_parallel
    report = rank_memory(model, options, rank=0, size=size)
    demand = snapshot_demand(model, options, size)
    assert dict(rows) == {
        "weights": f"{report.weights_bytes / GIB:.1f}",
        "KV blocks": f"{report.kv_bytes / GIB:.1f}",
        "recurrent states": f"{report.state_bytes / GIB:.1f}",
        "their copies in a step": f"{report.step_bytes / GIB:.1f}",
        "states of the prefix cache": f"{report.checkpoint_bytes / GIB:.1f}",
        "store of snapshots": f"{config.gateways.snapshot_store_bytes / GIB:.1f}",
        "snapshots that are restored": f"{demand.max_tokens * demand.token_bytes / GIB:.1f}",
    }

    found = re.findall(r"^\| Qwen3.5-(\w+)-\S+ \| (.+) \|$", page, re.MULTILINE)
    assert {name.lower(): cells.split(" | ") for name, cells in found} == {
        name: snapshot_cells(model) for name, model in MODELS.items()
    }


def snapshot_cells(model):
    """Return states, KV of a token, and sequences of a one-rank gateway, as the page has them."""
    demand = snapshot_demand(model, gateway_options(validate({"gateways": {"num_gpus": 1}})), 1)
    sequences = [f"{demand.sequence_bytes(n) / _MIB:,.0f} MiB" for n in (1024, 8192, 131_072)]
    in_default = demand.num_held(2**30, 8192)
    kib = demand.token_bytes // 1024
    return [f"{demand.state_bytes / _MIB:.0f} MiB", f"{kib} KiB", *sequences, str(in_default)]


@cases
def test_a_pod_has_a_gpu_for_every_process(stem):
    config, groups, _ = example(stem)
    for group in groups:
        gpus = int(group["rayStartParams"]["num-gpus"])
        if group["groupName"].startswith("gateway"):
            assert gpus == float(group["resources"]["gateway"]) * config.gateways.num_gpus
            assert float(group["resources"]["gateway"]) % config.gateways.tensor_parallel == 0
        if group["groupName"].startswith("expert"):
            assert gpus == config.experts.num_gpus


def test_one_node_has_eight_gpus():
    _, groups, _ = example("one-node-122b")

    assert sum(int(g["rayStartParams"]["num-gpus"]) * g["maxReplicas"] for g in groups) == 8
