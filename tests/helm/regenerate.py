"""Writes what is derived from the chart: its values' schema, the README's table, the goldens."""

import tools.chart_schema
from tests.helm.harness_helm import EXAMPLES, ROOT, template

tools.chart_schema.main()
for path in EXAMPLES:
    (ROOT / "tests" / "helm" / "goldens" / path.name).write_text(template(files=[path]))
