"""Every example, by helm 3 and helm 4."""

import pytest
import yaml

from cluster.config import validate
from tests.helm.harness_helm import (
    CHART,
    EXAMPLES,
    PINS,
    ROOT,
    helm_binary,
    manifests,
    named,
    run,
    template,
)
from tests.helm.harness_schema import KUBERNETES, check_built_in, check_ray_cluster, is_built_in

GOLDENS = ROOT / "tests" / "helm" / "goldens"
examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
majors = pytest.mark.parametrize("major", sorted(PINS))


@pytest.fixture(scope="module")
def rendered():
    return {path: manifests(template(files=[path])) for path in EXAMPLES}


def test_there_is_an_example_of_each_kind():
    assert {path.stem for path in EXAMPLES} == {
        "air-gapped", "cpu-smoke", "mtls", "one-node-122b", "production-397b",
    }  # fmt: skip


@majors
def test_helm_is_of_the_version_that_is_asked_for(major):
    assert run(major, "version", "--short").startswith(f"v{major}.")
    assert helm_binary(major).is_file()


@majors
@examples
def test_an_example_passes_lint(example, major):
    run(major, "lint", "--strict", CHART, "--values", example)


@examples
def test_helm_3_renders_what_helm_4_renders(example, rendered):
    assert manifests(template("3", files=[example])) == rendered[example]


@examples
def test_a_golden_is_current(example, rendered):
    golden = manifests((GOLDENS / example.name).read_text())

    assert golden == rendered[example], "run `make chart` and look at the difference"


@majors
def test_a_package_renders_what_the_chart_renders(major, tmp_path):
    run(major, "package", CHART, "--destination", tmp_path)
    (package,) = tmp_path.glob("expertmesh-*.tgz")

    again = template(major, files=EXAMPLES[:1], chart=package)

    assert manifests(again) == manifests(template(major, files=EXAMPLES[:1]))


@pytest.mark.parametrize("version", KUBERNETES)
@examples
def test_kubernetes_knows_every_field(example, version, rendered):
    for manifest in rendered[example]:
        if is_built_in(manifest):
            check_built_in(manifest, version)


@examples
def test_kuberay_knows_every_field(example, rendered):
    check_ray_cluster(named(rendered[example], "RayCluster"))


@examples
def test_the_product_reads_the_rendered_configuration_as_it_was_given(example, rendered):
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["config"]
    given = yaml.safe_load(example.read_text())["config"]
    text = named(rendered[example], "ConfigMap", "-expertmesh")["data"]["config.yaml"]

    config = validate(yaml.safe_load(text))

    expected = {
        key: {**defaults.get(key, {}), **given.get(key, {})} for key in {**defaults, **given}
    }
    assert config == validate(expected)


@examples
def test_every_object_is_labelled_and_lies_in_the_release_s_namespace(example, rendered):
    for manifest in rendered[example]:
        metadata = manifest["metadata"]
        assert metadata["namespace"] == "prod"
        assert metadata["labels"]["app.kubernetes.io/instance"] == "rel"
        assert metadata["labels"]["app.kubernetes.io/component"]


@examples
def test_no_two_objects_have_one_name(example, rendered):
    names = [(m["kind"], m["metadata"]["name"]) for m in rendered[example]]

    assert len(set(names)) == len(names)


@examples
def test_rendering_depends_on_nothing_but_the_values(example):
    once = template(files=[example])

    assert template(files=[example], more=["--debug"]) == once  # not from the harness's memory
