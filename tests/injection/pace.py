"""Has every expert take EXPERT_MS, as on an accelerator of its own.

Workers that share two cores cannot show what more of them bring. Here they wait instead, without a
core, for as long as their batch's experts would take; what they compute stays what it is.
"""

import os
import time
from typing import Any


def slow_down(module: Any) -> None:
    """Change `workers.model.experts`."""
    shard, expert_s = module.ExpertShard, float(os.environ["EXPERT_MS"]) / 1000
    forward = shard.forward

    def paced(self: Any, x: Any, rows: Any, slots: Any, offsets: Any) -> Any:
        started_s = time.perf_counter()
        y = forward(self, x, rows, slots, offsets)
        time.sleep(max(len(slots) * expert_s - (time.perf_counter() - started_s), 0.0))
        return y

    shard.forward = paced
