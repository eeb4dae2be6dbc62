"""Changes a module in processes that a test only starts: Python imports this by itself.

`environment_of` in `tests/injection/into.py` says how a test has it found. INJECT names what is
called, as MODULE:FUNCTION, with the module INJECT_INTO as soon as that has been imported.
"""

import os
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

MODULE = os.environ.get("INJECT_INTO", "")


class Injection(MetaPathFinder):
    """Changes one module as soon as it is imported, and is gone."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        del path, target
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            source, _, function = os.environ["INJECT"].partition(":")
            getattr(import_module(source), function)(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if MODULE:
    sys.meta_path.insert(0, Injection())
