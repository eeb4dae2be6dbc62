"""What the delta rule takes for some rows: a value that moves between a mixer and its kernels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaInputs:
    """Rows of one linear layer; N rows, KH / VH key and value heads, DK / DV their sizes.

    Queries and keys are L2-normalised and not scaled; decays are natural logarithms, at most 0.
    """

    qk: Tensor  # [N, 2, KH, DK]: queries, keys
    v: Tensor  # [N, VH, DV]
    log_decay: Tensor  # [N, VH], float32
    beta: Tensor  # [N, VH], float32

    def rows(self, rows: slice) -> "DeltaInputs":
        """Return some of the rows."""
        if rows.start == 0 and rows.stop == self.v.shape[0]:
            return self
        return DeltaInputs(
            qk=self.qk[rows], v=self.v[rows], log_decay=self.log_decay[rows], beta=self.beta[rows]
        )
