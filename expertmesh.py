"""The command's entry: first makes sure that the packages it imports are this project's.

`cluster` and `workers` are common names; other distributions carry them too.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Run the `expertmesh` command."""
    for name in ("cluster", "workers"):
        if reason := foreign(name):
            sys.exit(f"expertmesh: {reason}")
    # Imported only now: the packages are known to be ours, and Ray reads its settings on import.
    from cluster.config import ray_environment

    ray_environment()
    from cluster.cli.main import run

    sys.exit(run())


def foreign(name: str) -> str:
    """Return why the package of this name is not ours, or an empty string when it is."""
    spec = importlib.util.find_spec(name)
    ours = Path(__file__).resolve().parent / name
    if spec is None:
        return f"the package {name!r} is missing from {ours.parent}: install expertmesh again"
    found = Path(spec.origin).resolve().parent if spec.origin else None
    if found == ours:
        return ""
    return (
        f"the package {name!r} resolves to {found or 'a namespace'} and not to {ours}: "
        f"another distribution or directory carries that name. Uninstall it, or run from elsewhere"
    )


if __name__ == "__main__":
    main()
