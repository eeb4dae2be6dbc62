"""The configuration: loud on what it does not know."""

import subprocess
import sys

import pytest

from cluster.config import load_config
from workers.errors import ConfigError


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


@pytest.mark.parametrize("setting", ["experts", "=3", "model.path.deeper=1=2"])
def test_a_malformed_setting_is_refused(setting) -> None:
    with pytest.raises(ConfigError):
        load_config(None, ["model.path=x", setting])


def test_a_missing_file_is_a_config_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().experts.workers = 7


def test_the_control_plane_imports_no_torch() -> None:
    code = "import sys, cluster.app, cluster.bodies.frontdoor;sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
