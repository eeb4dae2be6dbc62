"""Where the demo model's files lie once the package is installed."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def demo_model_path() -> Path:
    """Return the directory that holds the demo model's checkpoint, tokenizer and chat template.

    Raises:
        FileNotFoundError: The package was installed without its data, for example from inside an
            archive; weights are read by offset and need real files.
    """
    directory = Path(str(files("cluster.demo")))
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the demo model is not in {directory}: install expertmesh as files, not as an archive"
        )
    return directory
