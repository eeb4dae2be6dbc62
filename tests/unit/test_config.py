"""The configuration: loud on what it does not know."""

import subprocess
import sys

import pytest

from cluster.app import ModelFacts, blueprints_of
from cluster.config import load_config
from workers.errors import ConfigError
from workers.placement import MemberId, Role


def test_defaults_are_complete() -> None:
    config = load_config()

    assert config.model.path == "demo"
    assert config.experts.workers == 2


def test_settings_override_the_file_and_are_read_as_yaml(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("experts: {workers: 5, floor: 2}\n")

    config = load_config(path, ["experts.workers=3", "dispatch.bit_stable=true"])

    assert (config.experts.workers, config.experts.floor) == (3, 2)
    assert config.dispatch.bit_stable is True


def test_all_problems_are_listed_with_their_paths_and_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["experts.wokers=3", "gateways.count=0", "telemetry.log_level=loud"])

    text = str(caught.value)
    assert "experts.wokers: unknown key; did you mean workers?" in text
    assert "gateways.count" in text
    assert "telemetry.log_level" in text


def test_rows_go_over_nccl_only_between_gpus() -> None:
    gpus = ["gateways.num_gpus=1", "experts.num_gpus=1"]

    assert load_config(None, ["dispatch.transport=nccl", *gpus]).dispatch.transport == "nccl"
    with pytest.raises(ConfigError, match="needs num_gpus of gateways and of experts"):
        load_config(None, ["dispatch.transport=nccl", gpus[0]])


def test_a_process_with_a_gpu_finds_what_nccl_must_know_before_it_starts() -> None:
    config = load_config(None, ["experts.num_gpus=1"])
    model = ModelFacts(directory="", name="m", num_layers=1, num_experts=1, weights_version="v")
    blueprints = blueprints_of(config, model, 1, "127.0.0.1")
    member = MemberId("any-0", 1)
    (worker,), (gateway,) = (
        blueprints[role](member) for role in (Role.EXPERT_WORKER, Role.GATEWAY)
    )

    assert worker.environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in gateway.environment


@pytest.mark.parametrize("setting", ["experts", "=3", "model.path.deeper=1=2"])
def test_a_malformed_setting_is_refused(setting) -> None:
    with pytest.raises(ConfigError):
        load_config(None, ["model.path=x", setting])


LISTENS = {
    "127.0.0.1:1": True, "127.9.0.1:1": True, "[::1]:1": True, "localhost:1": True,
    "unix:/run/door": True, "0.0.0.0:1": False, "[::]:1": False, ":1": False, "10.0.0.1:1": False,
    "door.example:1": False, "localhost.example:1": False,
}  # fmt: skip
WAYS = {
    "nothing": ([], False),
    "keys": (["front_doors.api_keys_file=keys"], True),
    "TLS alone": (["front_doors.tls={cert: c, key: k}"], False),
    "mTLS": (["front_doors.tls={cert: c, key: k, client_ca: a}"], True),
    "insecure": (["front_doors.insecure=true"], True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("listen", LISTENS)
def test_beyond_loopback_nobody_is_served_who_is_not_known_unless_that_is_meant(listen, way):
    settings, allowed = WAYS[way]
    settings = [*settings, f"front_doors.listen='{listen}'"]
    if allowed or LISTENS[listen]:
        assert load_config(None, settings).front_doors.listen == listen
        return
    with pytest.raises(ConfigError, match=r"api_keys_file or .*client_ca .*--insecure"):
        load_config(None, settings)


@pytest.mark.parametrize("tls", ["{cert: c}", "{key: k}", "{client_ca: a}"])
def test_half_of_a_tls_section_is_refused(tls):
    with pytest.raises(ConfigError, match=r"front_doors\.tls: set cert and key together"):
        load_config(None, [f"front_doors.tls={tls}"])


def test_a_missing_file_is_a_config_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().experts.workers = 7


def test_the_control_plane_imports_no_torch() -> None:
    code = "import sys, cluster.app, cluster.bodies.frontdoor;sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["experts.workers=5", "experts.max=2", "control.cells=2", "gateways.count=2"],
         "experts.workers: 5 is above 4"),
        (["gateways.count=2", "gateways.tensor_parallel=2", "gateways.cell_ranks=3"],
         "gateways.count: 2 is above 1"),
        (["experts.max=129"], "experts.max: .* less than or equal to 128"),
        (["control.cells=2", "gateways.count=2", "experts.workers=4", "experts.min=1"],
         "experts.min: 1 is too few for 2 cells"),
        (["autoscaler.experts.max=200"], "autoscaler.experts.max: 200 is above 128"),
        (["control.cells=2"], "gateways.count: 1 is too few for 2 cells"),
        (["control.cells=3", "gateways.count=3"], "experts.workers: 2 is too few for 3 cells"),
    ],
)  # fmt: skip
def test_more_than_links_suffice_for_and_fewer_than_cells_are_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config(None, settings)


def test_slots_by_pool_need_slots_for_every_other_pool() -> None:
    pools = {"experts.pool_slots": {"expert-h200": 8}}
    with pytest.raises(ConfigError, match="pool_slots needs slots"):
        load_config(given=pools)
    config = load_config(given={**pools, "experts.slots": 4})
    assert config.experts.pool_slots == {"expert-h200": 8}
    with pytest.raises(ConfigError, match=r"experts\.pool_slots\.expert-h200"):
        load_config(settings=["experts.slots=4", "experts.pool_slots={expert-h200: 0}"])


def test_cells_make_room_for_more_members() -> None:
    settings = ["experts.workers=4", "experts.max=2", "control.cells=2", "gateways.count=4"]
    assert load_config(None, settings).experts.workers == 4
    inside = ["experts.workers=0", "gateways.count=500"]
    assert load_config(None, inside).gateways.count == 500


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ([], "float32"),
        (["gateways.num_gpus=1"], "bfloat16"),
        (["experts.num_gpus=1"], "bfloat16"),
        (["experts.num_gpus=1", "model.dtype=float32"], "float32"),
        (["model.dtype=bfloat16"], "bfloat16"),
    ],
)
def test_all_processes_compute_in_one_dtype(settings, dtype) -> None:
    assert load_config(None, settings).compute_dtype == dtype
