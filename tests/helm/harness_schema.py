"""What manifests are checked against: Kubernetes' own schemas, and RayCluster's where it lies."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helm.harness_helm import ROOT

CRDS = ROOT.parent / "shared" / "data" / "crds"
KUBERNETES = ("1.30", "1.37")
_GROUPS = ("ray.io/", "monitoring.coreos.com/", "cert-manager.io/", "gateway.networking.k8s.io/")
_OPEN = ("x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource")


def is_built_in(manifest: Mapping[str, Any]) -> bool:
    return not manifest["apiVersion"].startswith(_GROUPS)


def check_built_in(manifest: Mapping[str, Any], version: str) -> None:
    """Raise when Kubernetes would refuse a manifest, or drop a field that it does not know."""
    kubernetes_validate.validate(dict(manifest), version, strict=True)


def check_ray_cluster(manifest: Mapping[str, Any]) -> None:
    """Raise when KubeRay's custom resource definition does not allow a RayCluster."""
    problems = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for error in ray_cluster_validator().iter_errors(manifest)
    ]
    assert problems == []


@functools.cache
def ray_cluster_validator() -> jsonschema.Draft7Validator:
    path = CRDS / "ray.io_rayclusters.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's definitions are not here ({path.parent.name} beside the checkout)")
    definition = _load(path)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    return jsonschema.Draft7Validator(_strict(version["schema"]["openAPIV3Schema"]))


def _load(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _strict(node: Any) -> Any:
    """Turn a structural schema into a JSON schema that refuses unknown fields."""
    if isinstance(node, list):
        return [_strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    found = {key: _strict(value) for key, value in node.items()}
    if found.pop("x-kubernetes-int-or-string", False) is True:
        found["type"] = ["integer", "string"]
    if found.pop("nullable", False) is True and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    is_open = any(found.get(key) is True for key in _OPEN)
    if isinstance(found.get("properties"), dict) and found.get("type") == "object" and not is_open:
        found.setdefault("additionalProperties", False)
    return found
