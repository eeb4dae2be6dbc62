"""The page for who is on call names every alert of the chart, and no other."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_each_alert_has_a_row_that_says_what_to_do() -> None:
    rules = yaml.safe_load((ROOT / "helm/expertmesh/files/alerts.yaml").read_text())
    page = (ROOT / "docs/alarms.md").read_text()
    alerts = page.split("## Alerts")[1].split("## Without")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", alerts, re.MULTILINE)

    assert ["Expertmesh" + name for name, *_ in rows] == [rule["alert"] for rule in rules]
