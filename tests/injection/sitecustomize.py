"""Changes modules in processes that a test only starts: Python imports this by itself.

`environment_of` in `tests/injection/into.py` says how a test has it found. INJECT names what is
called, as MODULE:FUNCTION, with each of the modules INJECT_INTO as soon as that has been imported.
"""

import os
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

MODULES = frozenset(filter(None, os.environ.get("INJECT_INTO", "").split(",")))


class Injection(MetaPathFinder):
    """Changes each module as soon as it is imported, and is gone after the last one."""

    def __init__(self) -> None:
        self._left = set(MODULES)

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        del path, target
        if name not in self._left:
            return None
        self._left.discard(name)  # the look-up below comes here again
        if not self._left:
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


if MODULES:
    sys.meta_path.insert(0, Injection())
