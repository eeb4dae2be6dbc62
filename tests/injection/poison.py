"""Has an expert worker end when it is to compute a certain row, as a bug in a kernel would."""

import json
import os
from pathlib import Path
from typing import Any

import torch


def die_of(module: Any, row: list[float]) -> None:
    """Change `workers.expert.worker`: its process ends by this row, but for rounding."""
    compute_batch, poison = module.compute_batch, torch.tensor(row)

    def dying(calls: Any, *more: Any) -> Any:
        rows = torch.cat([c.frame.rows(c.header.num_rows).values_RH for c in calls])
        if bool(((rows - poison).norm(dim=-1) < 1e-3 * poison.norm()).any()):
            os._exit(1)
        return compute_batch(calls, *more)

    module.compute_batch = dying


def die_of_row(module: Any) -> None:
    """As `die_of`, of the row in the file POISON_ROW."""
    die_of(module, json.loads(Path(os.environ["POISON_ROW"]).read_text()))
