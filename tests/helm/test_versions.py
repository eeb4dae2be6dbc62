"""Image, chart, Ray and the project name one version each."""

import re
import tomllib

import yaml

from tests.helm.harness_helm import CHART, EXAMPLES, ROOT, manifests, named, pods, template

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
META = yaml.safe_load((CHART / "Chart.yaml").read_text())
DOCKERFILE = (ROOT / "helm" / "Dockerfile").read_text()


def pin(name):
    (found,) = [d for d in PROJECT["dependencies"] if re.match(rf"{name}==", d)]
    return found.partition("==")[2]


def test_the_image_s_tag_is_the_project_s_version():
    found = manifests(template(files=[EXAMPLES[1]]))

    assert META["appVersion"] == PROJECT["version"]
    for _, pod in pods(found):
        assert pod["spec"]["containers"][0]["image"] == f"expertmesh:{PROJECT['version']}"


def test_kuberay_is_told_the_version_of_ray_that_is_installed():
    cluster = named(manifests(template(files=[EXAMPLES[1]])), "RayCluster")

    assert cluster["spec"]["rayVersion"] == pin("ray")
    assert META["annotations"]["expertmesh/ray-version"] == pin("ray")


def test_the_dockerfile_installs_the_same_versions():
    assert f"ARG VERSION={PROJECT['version']}" in DOCKERFILE
    assert "ray[default]==" + pin("ray") in DOCKERFILE
    assert "torch==" + pin("torch") in DOCKERFILE
    for file in ("constraints-cpu.txt", "constraints-image.txt"):
        assert f"--constraint {file}" in DOCKERFILE


def test_the_image_runs_as_the_user_that_the_chart_names():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    user = values["securityContext"]["runAsUser"]

    assert re.search(rf"^USER {user}:{values['securityContext']['runAsGroup']}$", DOCKERFILE, re.M)


def test_no_package_has_two_pins():
    def names(path):
        lines = path.read_text().splitlines()
        return {
            re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
            for line in lines
            if "==" in line
        }

    assert not names(ROOT / "constraints-cpu.txt") & names(ROOT / "helm" / "constraints-image.txt")
