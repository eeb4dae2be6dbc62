"""How often each expert is asked for, counted where its rows leave: pure numpy, a bincount a layer.

Reports travel with the pulse of a rank, never in a collective, and are bounded: each carries the
layers whose turn it is, so that a full round takes several pulses in large models.
Shape legend: R rows, K experts a row, L layers, E experts, N layers of one report.
"""

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPORT_BYTES = 32 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class LoadReport:
    """What was dispatched in some layers since they were last reported.

    `calls_N` counts the batches of a layer, `rows_NE` the rows that named an expert, and
    `activated_NE` the batches in which at least one row did.
    """

    layers: tuple[int, ...]
    calls_N: NDArray[np.uint32]
    rows_NE: NDArray[np.uint32]
    activated_NE: NDArray[np.uint32]

    @property
    def num_bytes(self) -> int:
        """How much the counts weigh."""
        return self.calls_N.nbytes + self.rows_NE.nbytes + self.activated_NE.nbytes


class LoadTally:
    """Counts rows and activations of one rank. One thread counts, another may take."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._calls: dict[int, int] = {}
        self._rows: dict[int, NDArray[np.uint32]] = {}
        self._activated: dict[int, NDArray[np.uint32]] = {}
        self._next = 0

    def count(self, layer: int, ids_RK: NDArray[np.int32], num_experts: int) -> None:
        """Count one batch of a layer; id -1 names no expert. Before there is a View nothing is."""
        if not num_experts:
            return
        rows_E = np.bincount(ids_RK.ravel() + 1, minlength=num_experts + 1)[1:]
        with self._changing:
            if layer not in self._calls:
                self._calls[layer] = 0
                self._rows[layer] = np.zeros(num_experts, dtype=np.uint32)
                self._activated[layer] = np.zeros(num_experts, dtype=np.uint32)
            self._calls[layer] += 1
            self._rows[layer] += rows_E.astype(np.uint32)
            self._activated[layer] += rows_E > 0

    def take(self, max_bytes: int = REPORT_BYTES) -> LoadReport | None:
        """Return what the next layers have counted, and forget it; None when nothing was.

        At least one layer is reported, the others as far as `max_bytes` go.
        """
        with self._changing:
            layers = self._due(max_bytes)
            if not layers:
                return None
            report = LoadReport(
                layers,
                np.array([self._calls.pop(layer) for layer in layers], dtype=np.uint32),
                np.stack([self._rows.pop(layer) for layer in layers]),
                np.stack([self._activated.pop(layer) for layer in layers]),
            )
        self._next = layers[-1] + 1
        return report

    def _due(self, max_bytes: int) -> tuple[int, ...]:
        """Return the layers with counts that come next, beginning anew after the last one."""
        counted = sorted(self._calls, key=lambda layer: (layer < self._next, layer))
        if not counted:
            return ()
        layer_bytes = 4 + 8 * len(self._rows[counted[0]])
        return tuple(counted[: max(max_bytes // layer_bytes, 1)])
