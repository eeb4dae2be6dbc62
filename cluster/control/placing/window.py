"""How often experts were asked for lately, from what pulses tell: a decayed window, pure.

Shape legend: L layers, E experts.
"""

import numpy as np
from numpy.typing import NDArray

from workers.dispatch.tally import LoadReport


class LoadWindow:
    """How often each expert was asked for lately: counts that lose half their weight in a while.

    Every layer decays by the clock alone, so that reports may come in any order and from anybody.
    """

    def __init__(self, num_layers: int, num_experts: int, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._decayed_s = 0.0
        self._calls_L = np.zeros(num_layers)
        self._rows_LE = np.zeros((num_layers, num_experts))
        self._activated_LE = np.zeros((num_layers, num_experts))

    def add(self, report: LoadReport, now_s: float) -> None:
        """Take a rank's report; of a layer that this model lacks nothing is taken."""
        self._decay(now_s)
        num_layers, num_experts = self._rows_LE.shape
        if report.rows_NE.shape[1] != num_experts or max(report.layers) >= num_layers:
            return
        layers = list(report.layers)
        self._calls_L[layers] += report.calls_N
        self._rows_LE[layers] += report.rows_NE
        self._activated_LE[layers] += report.activated_NE

    def has_seen(self, num_calls: float) -> bool:
        """Whether every layer has been seen in so many batches, decayed."""
        return bool((self._calls_L >= num_calls).all())

    @property
    def rows_LE(self) -> NDArray[np.float64]:
        """Rows that named an expert, decayed."""
        return self._rows_LE

    def activation_LE(self) -> NDArray[np.float64]:
        """Return the share of batches that activate each expert, at the batch sizes in use.

        An expert that was never seen counts as half a batch: the window is finite.
        """
        share_LE: NDArray[np.float64] = (self._activated_LE + 0.5) / (self._calls_L[:, None] + 1.0)
        return np.minimum(share_LE, 1.0)

    def _decay(self, now_s: float) -> None:
        if now_s <= self._decayed_s:
            return
        factor = 0.5 ** ((now_s - self._decayed_s) / self._half_life_s)
        self._decayed_s = now_s
        self._calls_L *= factor
        self._rows_LE *= factor
        self._activated_LE *= factor
