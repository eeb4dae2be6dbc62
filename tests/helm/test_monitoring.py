"""Alerts and panels name only what is exported; docs/metrics.md lists it, and is itself tested."""

import json
import re

import pytest
import yaml

from tests.helm.harness_helm import CHART, EXAMPLES, ROOT, manifests, named, template

NAME = re.compile(r"\bexpertmesh_[a-z0-9_]+")
ROW = re.compile(r"^\| `(expertmesh_\w+)` \| (\w+) \| ([\w, ]+) \|", re.MULTILINE)
PRODUCTION = next(path for path in EXAMPLES if path.stem == "production-397b")
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
FROM_THE_SCRAPE = {"namespace", "le"}


def series():
    """Return the exported series by name, with their labels."""
    found = {}
    for name, kind, labels in ROW.findall((ROOT / "docs" / "metrics.md").read_text()):
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found.update({name + s: set(labels.split(", ")) for s in suffixes})
    return found


def rules():
    return yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())


def expressions():
    yield from ((rule["alert"], rule["expr"]) for rule in rules())
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_an_expression_names_only_series_and_labels_that_are_exported(where, expression):
    names = set(NAME.findall(expression))
    assert names
    assert names <= set(series()), where
    labels = set.union(*(series()[name] for name in names)) | FROM_THE_SCRAPE
    by = re.findall(r"\bby \(([^)]*)\)", expression)
    used = {label.strip() for group in by for label in group.split(",")}
    used |= set(re.findall(r"[{,]\s*(\w+)=", expression))
    assert used <= labels, where


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_brackets_of_an_expression_close(where, expression):
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing), where


def test_counters_are_looked_at_as_rates():
    for where, expression in expressions():
        for name in re.findall(r"\bexpertmesh_\w+(?:_total|_bucket)\b", expression):
            assert re.search(rf"rate\({name}\b", expression), f"{where}: {name}"


def test_alerts_say_how_bad_it_is_and_what_it_means():
    for rule in rules():
        assert rule["alert"].startswith("Expertmesh")
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert {"summary", "description"} == set(rule["annotations"])


def test_rendered_alerts_look_at_the_release_s_namespace_alone():
    rendered = named(manifests(template(files=[PRODUCTION])), "PrometheusRule")
    expressions = [rule["expr"] for group in rendered["spec"]["groups"] for rule in group["rules"]]

    assert len(expressions) == len(rules())
    for expression in expressions:
        assert expression.count('namespace="prod"') == len(NAME.findall(expression))


def test_rendered_dashboards_are_those_of_the_chart():
    found = manifests(template(files=[PRODUCTION]))
    for path in DASHBOARDS:
        config_map = named(found, "ConfigMap", f"-{path.stem}")
        assert json.loads(config_map["data"][path.name]) == json.loads(path.read_text())
        assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_monitored_ports_are_ports_of_the_pods():
    found = manifests(template(files=[PRODUCTION]))
    monitor = named(found, "PodMonitor")["spec"]
    groups = named(found, "RayCluster")["spec"]["workerGroupSpecs"]

    for endpoint in monitor["podMetricsEndpoints"]:
        for group in groups:
            ports = group["template"]["spec"]["containers"][0]["ports"]
            assert endpoint["port"] in {port["name"] for port in ports}
