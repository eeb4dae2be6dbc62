"""Metrics: what is documented is exported and what is exported is documented."""

import io
import json
import re
import urllib.request
from dataclasses import fields
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry

from cluster import telemetry
from cluster.bodies.process import own_port
from workers.types import GatewayStats, WorkerStats

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    gateway = GatewayStats(
        running=3, recovery_s=0.5, recoveries=(4, 1, *[0] * 10), rows_by_worker={"w0.1": 7}
    )
    registry.register(telemetry.StatsCollector(lambda: gateway, telemetry.GATEWAY_SAMPLES, "g0.1"))
    registry.register(
        telemetry.StatsCollector(lambda: WorkerStats(rows=5), telemetry.WORKER_SAMPLES, "w0.1")
    )
    telemetry.ViewGauges(registry, "g0.1").set(1, 2, 3)
    door = telemetry.FrontDoorInstruments(registry, "f0.1")
    door.load_changed(2, 1)
    door.request_admitted(10)
    door.first_token(0.1)
    door.tokens(2, 0.01)
    door.request_ended("Generate", "OK")
    return registry


def exported(registry: CollectorRegistry) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return name -> (kind, labels) of all families, named as a dashboard sees them."""
    families = {}
    for family in registry.collect():
        labels = tuple(label for label in family.samples[0].labels if label != "le")
        suffix = "_total" if family.type == "counter" else ""
        families[family.name + suffix] = (family.type, labels)
    return families


def test_the_document_lists_exactly_what_is_exported(registry) -> None:
    row = re.compile(r"^\| `(\w+)` \| (\w+) \| ([\w, ]+) \|", re.MULTILINE)
    documented = {
        name: (kind, tuple(labels.split(", ")))
        for name, kind, labels in row.findall(DOCUMENT.read_text())
    }

    assert documented == exported(registry)


def test_every_number_of_the_statistics_is_exported() -> None:
    for stats, samples in (
        (GatewayStats, telemetry.GATEWAY_SAMPLES),
        (WorkerStats, telemetry.WORKER_SAMPLES),
    ):
        numbers = {f.name for f in fields(stats)} - {"rows_by_worker", "recovery_s", "recoveries"}
        assert numbers == {s.field for s in samples}


def test_values_are_those_of_the_statistics(registry) -> None:
    assert (
        registry.get_sample_value("expertmesh_gateway_running_sequences", {"member": "g0.1"}) == 3
    )
    rows = {"member": "g0.1", "worker": "w0.1"}
    assert registry.get_sample_value("expertmesh_gateway_rows_total", rows) == 7
    name = "expertmesh_gateway_recovery_seconds"
    for bound, count in (("0.002", 4), ("0.005", 5), ("+Inf", 5)):
        labels = {"member": "g0.1", "le": bound}
        assert registry.get_sample_value(f"{name}_bucket", labels) == count
    assert registry.get_sample_value(f"{name}_sum", {"member": "g0.1"}) == 0.5


def test_the_page_is_served_on_a_free_port(registry) -> None:
    address = telemetry.serve_metrics(registry, "127.0.0.1", 0)

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
        assert b"expertmesh_worker_rows_total" in page.read()


def test_a_page_whose_port_is_taken_is_served_on_another(registry) -> None:
    first = telemetry.serve_metrics(registry, "127.0.0.1", 0)
    second = telemetry.serve_metrics(registry, "127.0.0.1", int(first.rpartition(":")[2]))

    assert first != second


def test_only_a_member_with_a_node_to_itself_takes_the_configured_port() -> None:
    assert own_port(9400, host="") == 9400
    assert own_port(9400, host="", rank=1) == 0
    assert own_port(9400, host="127.0.0.1") == 0


def test_log_lines_are_json_with_role_and_member(monkeypatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(telemetry.sys, "stderr", stream)
    telemetry.configure_logging("gateway", "g0.1", "info")
    log = structlog.get_logger()
    log.info("step", request_id="r1")
    log.debug("not shown")
    structlog.reset_defaults()

    (line,) = stream.getvalue().splitlines()
    assert json.loads(line).items() >= {
        "role": "gateway", "member": "g0.1", "request_id": "r1", "level": "info",
    }.items()  # fmt: skip
