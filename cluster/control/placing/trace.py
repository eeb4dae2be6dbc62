"""Recorded routing: which experts each row of each step activated, in every layer.

A trace is one compressed .npz file, readable with numpy alone:

    version      int      1
    model        str      what was recorded
    num_experts  int      E, experts of a layer
    rows_S       uint32   rows of each step, in order of time
    ids_RLK      uint16   expert ids of each row, layer and choice; the rows of all steps, one after
                          the other, so that R is the sum of rows_S

Shape legend: S steps, R rows, L layers, K experts a row, E experts, N batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.errors import TraceError

VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """What was recorded; see the module."""

    model: str
    num_experts: int
    rows_S: NDArray[np.uint32]
    ids_RLK: NDArray[np.uint16]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.ids_RLK.shape[1])

    def save(self, path: Path) -> None:
        """Write the file."""
        np.savez_compressed(
            path,
            version=np.int64(VERSION),
            model=np.str_(self.model),
            num_experts=np.int64(self.num_experts),
            rows_S=self.rows_S,
            ids_RLK=self.ids_RLK,
        )

    @classmethod
    def load(cls, path: Path) -> "RoutingTrace":
        """Read a file.

        Raises TraceError when it is not a trace, of another version, or contradicts itself.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                version = int(file["version"])
                if version != VERSION:
                    raise TraceError(f"{path} is a trace of version {version}, not {VERSION}")
                trace = cls(
                    str(file["model"]), int(file["num_experts"]), file["rows_S"], file["ids_RLK"]
                )
        except (OSError, KeyError, ValueError) as error:
            raise TraceError(f"{path} is no recorded trace: {error}") from error
        if trace.ids_RLK.ndim != 3 or int(trace.rows_S.sum()) != len(trace.ids_RLK):
            raise TraceError(f"{path}: its steps have not as many rows as it holds")
        if trace.ids_RLK.size and int(trace.ids_RLK.max()) >= trace.num_experts:
            raise TraceError(f"{path} names experts beyond its {trace.num_experts}")
        return trace

    def steps(self) -> Iterator[NDArray[np.uint16]]:
        """Yield the ids of each step, [rows, L, K]."""
        yield from np.split(self.ids_RLK, np.cumsum(self.rows_S)[:-1])

    def shares_LE(self) -> NDArray[np.float64]:
        """Return the share of rows that name each expert."""
        flat_LR = self.ids_RLK.transpose(1, 0, 2).reshape(self.num_layers, -1)
        counts = [np.bincount(ids, minlength=self.num_experts) for ids in flat_LR]
        return np.stack(counts) / max(len(self.ids_RLK), 1)

    def batches_LNE(self, num_rows: int, num_batches: int, seed: int) -> NDArray[np.bool_]:
        """Return which experts batches of so many rows activate, [L, N, E].

        Rows are drawn from the whole trace: a batch of decoding steps takes its rows from as many
        sequences.
        """
        draw = np.random.default_rng(seed)
        found_NLE = np.zeros((num_batches, self.num_layers, self.num_experts), dtype=bool)
        layers = np.arange(self.num_layers)[None, :, None]
        for found_LE in found_NLE:
            rows = draw.choice(len(self.ids_RLK), num_rows, replace=num_rows > len(self.ids_RLK))
            found_LE[layers, self.ids_RLK[rows]] = True
        return found_NLE.transpose(1, 0, 2)


def activation_of(shares_LE: NDArray[np.float64], num_rows: int) -> NDArray[np.float64]:
    """Return the share of batches of so many rows that activate each expert, rows independent."""
    kept_LE: NDArray[np.float64] = (1.0 - np.minimum(shares_LE, 1.0)) ** num_rows
    return 1.0 - kept_LE
