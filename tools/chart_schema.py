"""Writes helm/expertmesh/values.schema.json and the table in its README, from values.yaml.

A value's type is that of its default, its description the `# --` comment above it; what a default
cannot tell is listed here. The schema of `config` is that of `cluster.config.ClusterConfig`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ClusterConfig

CHART = Path(__file__).parents[1] / "helm" / "expertmesh"
_MARKS = ("<!-- values: begin -->", "<!-- values: end -->")

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_ANY_OBJECT = {"type": "object"}
_OBJECTS = {"type": "array", "items": _ANY_OBJECT}
_QUANTITY = {"type": ["string", "number"]}
_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY}
_NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}}
_DEVICE_COUNT = {"type": "integer", "minimum": 0}
_POD = "pod"
_TEXTS_AT = (
    "annotations", "commonAnnotations", "commonLabels", "labels", "nodeSelector", "podAnnotations",
    "podLabels", "rayLabels",
)  # fmt: skip

# By the last words of a path; the longest that fits counts.
_RULES: dict[str, dict[str, Any]] = {
    "accessModes": {
        "type": "array",
        "minItems": 1,
        "items": {"enum": ["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany", "ReadOnlyMany"]},
    },
    "affinity": _ANY_OBJECT,
    "apiServerPorts": {"type": "array", "items": {"type": "integer"}},
    "config": {"$ref": "#/definitions/ClusterConfig"},
    "drainSeconds": {"type": ["integer", "null"], "minimum": 0},
    "existingSecret": {"type": "string"},
    "extraObjects": {"type": "array", "items": {"type": ["object", "string"]}},
    "gpu.count": _DEVICE_COUNT,
    "hostPath.type": {"enum": ["", "Directory", "DirectoryOrCreate"]},
    "hostnames": _NAMES,
    "imagePullSecrets": _NAMES,
    "issuerRef": {
        "type": "object",
        "additionalProperties": False,
        "properties": {key: {"type": "string"} for key in ("name", "kind", "group")},
    },
    "loadBalancerSourceRanges": _NAMES,
    "dnsNames": _NAMES,
    "model.source": {"enum": ["image", "pvc", "hostPath"]},
    "pdb.minAvailable": {"type": ["integer", "null"], "minimum": 0},
    "preload.from": {"enum": ["hf", "s3"]},
    "priority": {"type": "integer"},
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "image.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "fullnameOverride": {"type": "string", "maxLength": 40},
    "ray.auth.mode": {"enum": ["token", "disabled"]},
    "ray.gcs.backend": {"enum": ["rocksdb", "redis", "none"]},
    "rdma.count": _DEVICE_COUNT,
    "resources": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"requests": _QUANTITIES, "limits": _QUANTITIES, "claims": _OBJECTS},
    },
    "service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "shmSize": _QUANTITY,
    "size": _QUANTITY,
    **dict.fromkeys(_TEXTS_AT, _TEXTS),
}  # fmt: skip


def schema() -> dict[str, Any]:
    """Return the schema of the chart's values."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    described = dict(descriptions(text))
    pod = _of(values["podDefaults"], "podDefaults", described)
    own_head = {k: v for k, v in values["head"].items() if k in {"serviceAccount", "persistence"}}
    config = _config()
    special = {
        "podDefaults": {"$ref": f"#/definitions/{_POD}"},
        "frontDoors": {"$ref": f"#/definitions/{_POD}"},
        "head": _extended(pod, _of(own_head, "head", described)),
        "gatewayPools": _pools(
            _extended(pod, {"properties": {"ranksPerPod": {"type": "integer", "minimum": 1}}})
        ),
        "expertPools": _pools({"$ref": f"#/definitions/{_POD}"}),
    }
    properties = {
        key: special.get(key) or _of(value, key, described) for key, value in values.items()
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart expertmesh",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "definitions": {**config, _POD: pod},
    }


def table() -> str:
    """Return the values as a Markdown table."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for path, words in descriptions(text):
        value = values
        for part in path.split("."):
            value = value[part]
        shown = "see values.yaml" if path == "config" else f"`{json.dumps(value)}`"
        rows.append(f"| `{path}` | {shown} | {words} |".replace("||", "|"))
    return "\n".join(rows)


def readme() -> str:
    """Return the chart's README with the table of today's values in it."""
    text = (CHART / "README.md").read_text()
    begin, end = _MARKS
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"


def descriptions(text: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted path of every described value of a values.yaml, and the description."""
    path: list[tuple[int, str]] = []
    words: list[str] = []
    for line in text.splitlines():
        comment = re.fullmatch(r"\s*# (--)? ?(.*)", line)
        if comment:
            if comment[1]:
                words = [comment[2]]
            elif words:
                words.append(comment[2])
            continue
        key = re.match(r"( *)([A-Za-z_]\w*):", line)
        if key:
            indent = len(key[1])
            path = [(i, name) for i, name in path if i < indent] + [(indent, key[2])]
            if words:
                yield ".".join(name for _, name in path), " ".join(words)
        words = []


def _of(value: Any, path: str, described: dict[str, str]) -> dict[str, Any]:  # noqa: ANN401
    """Return the schema of a value with this default."""
    found: dict[str, Any] = _ruled(path) or {}
    if not found and isinstance(value, dict) and value:
        found = {
            "type": "object",
            "additionalProperties": False,
            "properties": {k: _of(v, f"{path}.{k}", described) for k, v in value.items()},
        }
    elif not found:
        found = _plain(value, path)
    if path in described and "$ref" not in found:
        found = {"description": described[path], **found}
    return found


def _plain(value: Any, path: str) -> dict[str, Any]:  # noqa: ANN401
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer", "minimum": 0}
    if isinstance(value, str):
        return {"type": "string"}
    if isinstance(value, list):
        return _OBJECTS
    raise ValueError(f"{path}: say in _RULES what it may be")


def _ruled(path: str) -> dict[str, Any] | None:
    parts = path.split(".")
    for start in range(len(parts)):
        rule = _RULES.get(".".join(parts[start:]))
        if rule is not None:
            return rule
    return None


def _extended(pod: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {**pod, "properties": {**pod["properties"], **more["properties"]}}


def _pools(pool: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of pools by name; null takes a default pool away."""
    name = "^[a-z0-9]([-a-z0-9]{0,18}[a-z0-9])?$"
    return {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": False,
        "patternProperties": {name: {"anyOf": [pool, {"type": "null"}]}},
    }


def _config() -> dict[str, Any]:
    found = ClusterConfig.model_json_schema(ref_template="#/definitions/{model}")
    definitions = found.pop("$defs")
    return {name: _without_titles(d) for name, d in {**definitions, "ClusterConfig": found}.items()}


def _without_titles(node: Any) -> Any:  # noqa: ANN401
    if isinstance(node, list):
        return [_without_titles(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {k: v for k, v in node.items() if k != "title" or not isinstance(v, str)}
    return {key: _without_titles(value) for key, value in kept.items()}


def main() -> None:
    """Write both files."""
    text = json.dumps(schema(), indent=2) + "\n"
    (CHART / "values.schema.json").write_text(text)
    (CHART / "README.md").write_text(readme())


if __name__ == "__main__":
    main()
