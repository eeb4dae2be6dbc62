"""The project's own files keep to what they promise."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:tmp|work|root)/[\w.]")
REGISTRY_HOST = re.compile(
    r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs)"
)


def tracked_files():
    """Return the text files that git tracks; a tree without git has none to check."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and path.suffix != ".safetensors"]


def offences(pattern):
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def dependencies():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def constraints():
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", ["torch", "ray"])
def test_packages_whose_private_names_are_used_are_pinned_alike_everywhere(name):
    (pin,) = [line for line in dependencies() if re.match(rf"{name}\b", line)]

    assert f"{name}=={constraints()[name]}" == pin


def test_every_dependency_has_a_constraint():
    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    named = {plain(re.match(r"[\w.-]+", line)[0]) for line in dependencies()}

    assert set() == named - {plain(name) for name in constraints()}


def test_the_makefile_begins_with_demo_and_test():
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert targets[:2] == ["demo", "test"]


def test_every_make_target_is_phony_and_explained():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    explained = set(re.findall(r"^([a-z][\w-]*): ## \w", text, re.MULTILINE))
    phony = set(re.search(r"\.PHONY:((?:.*\\\n)*.*)", text)[1].replace("\\", " ").split())

    assert targets == explained == phony


def test_no_tracked_file_names_a_path_of_one_machine():
    assert offences(MACHINE_PATH) == []


def test_no_tracked_file_names_a_registry_host():
    found = offences(REGISTRY_HOST)

    assert [line for line in found if not line.startswith("tests/unit/test_project_files.py")] == []


def test_init_files_hold_a_docstring_and_nothing_else():
    crowded = [
        str(path.relative_to(ROOT))
        for package in ("cluster", "workers")
        for path in (ROOT / package).rglob("__init__.py")
        if not re.fullmatch(r'(?:"""[^"]*"""\s*)?', path.read_text())
    ]

    assert crowded == []


@pytest.mark.parametrize(
    ("module", "strangers"),
    [
        ("cluster.config", {"torch", "ray", "grpc"}),
        ("cluster.control.controller", {"torch", "ray", "grpc"}),
        ("cluster.frontdoor.server", {"torch", "ray"}),
        ("cluster.cli.main", {"torch"}),
    ],
)
def test_modules_that_decide_import_without_heavy_libraries(module, strangers):
    program = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert set() == strangers & set(ended.stdout.split())
