"""The files of the published model, which stay out of the repository."""

import lzma
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "cluster" / "demo"
PUBLISHED = ROOT.parent / "shared" / "data" / "qwen3.5-397b-a17b"


def published_directory(tmp_path_factory) -> Path:
    """Return a directory with the published tokenizer, template and configuration."""
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published tokenizer and template are not at {PUBLISHED}")
    directory = tmp_path_factory.mktemp("published")
    for file in PUBLISHED.glob("*.json*"):
        if file.suffix != ".xz":
            (directory / file.name).write_bytes(file.read_bytes())
    (directory / "chat_template.jinja").write_bytes(
        (PUBLISHED / "chat_template.jinja").read_bytes()
    )
    with lzma.open(PUBLISHED / "tokenizer.json.xz") as tokenizer:
        (directory / "tokenizer.json").write_bytes(tokenizer.read())
    return directory
