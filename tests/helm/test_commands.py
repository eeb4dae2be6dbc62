"""What manifests, notes and pages tell people and pods to run is there."""

import re

import pytest
from typer.main import get_command

from cluster.cli.main import app
from tests.helm.harness_helm import CHART, EXAMPLES, ROOT, manifests, pods, template

PAGES = [CHART / "README.md", CHART / "templates" / "NOTES.txt", ROOT / "helm" / "README.md"]
COMMANDS = get_command(app).commands


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_containers_run_commands_with_options_that_there_are(example):
    seen = set()
    for _, pod in pods(manifests(template(files=[example]))):
        for container in pod["spec"]["containers"]:
            program, *words = container["command"]
            if program != "expertmesh":
                continue
            (name,) = words
            seen.add(name)
            flags = {a.partition("=")[0] for a in container["args"] if a.startswith("--")}
            known = {flag for option in COMMANDS[name].params for flag in option.opts}
            assert flags <= known

    assert seen == {"apply", "generate"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_name_commands_that_there_are(page):
    named = set(re.findall(r"(?:`|bin/|^ *|')expertmesh ([a-z]+)", page.read_text(), re.MULTILINE))

    assert named
    assert named <= set(COMMANDS)


def test_the_newcomer_s_page_names_make_targets_and_files_that_there_are():
    text = (ROOT / "helm" / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()

    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (ROOT / "helm" / link).exists()
