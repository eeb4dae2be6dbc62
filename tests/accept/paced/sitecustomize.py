"""Has every expert take EXPERT_MS, as on an accelerator of its own: Python imports this by itself.

Workers that share two cores cannot show what more of them bring. Here they wait instead, without a
core, for as long as their batch's experts would take; what they compute stays what it is.
"""

import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

MODULE = "workers.model.experts"
EXPERT_S = float(os.environ.get("EXPERT_MS", "0")) / 1000


class Pace(MetaPathFinder):
    """Changes the module of experts as soon as it is imported, and is gone."""

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
            slow_down(module.ExpertShard)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def slow_down(shard: Any) -> None:
    forward = shard.forward

    def paced(self: Any, x: Any, rows: Any, slots: Any, offsets: Any) -> Any:
        started_s = time.perf_counter()
        y = forward(self, x, rows, slots, offsets)
        time.sleep(max(len(slots) * EXPERT_S - (time.perf_counter() - started_s), 0.0))
        return y

    shard.forward = paced


if EXPERT_S:
    sys.meta_path.insert(0, Pace())
