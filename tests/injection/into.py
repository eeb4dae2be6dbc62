"""How a test has processes that it only starts do something else in some modules."""

import os
from pathlib import Path

HERE = Path(__file__).parent


def environment_of(modules: str, change: str, **more: str) -> dict[str, str]:
    """Return the environment in which `change` (MODULE:FUNCTION) is called with each module.

    `modules` are one or several with commas between; `more` is for the change to read.
    """
    paths = (str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", ""))
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "INJECT_INTO": modules,
        "INJECT": change,
        **more,
    }
