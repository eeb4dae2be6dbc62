"""The small parts that every layer is made of: linear maps, norms and vocabulary-parallel lookups.

Shape legend: R rows, D features in, O features out, T tokens, V vocabulary rows of this rank.
"""

import torch
from torch import Tensor
from torch.nn import functional

ROW_TILE = 16
"""Rows of a matrix product in bit-stable mode: zero padded, so that a row's result does not depend
on its company."""


class Linear:
    """A linear map, its weights kept as [in, out].

    On a CPU that order makes products of 2 to 32 rows faster than [out, in] does. Several maps of
    the same input are joined into one product.
    """

    def __init__(self, *weights_OD: Tensor, row_tile: int | None = None) -> None:
        self._weight_DO = torch.cat(weights_OD).t().contiguous()
        self._row_tile = row_tile

    def __call__(self, x_RD: Tensor) -> Tensor:
        """Return x_RD times the weights, [R, O]."""
        if self._row_tile is None:
            return torch.mm(x_RD, self._weight_DO)
        return tiled_mm(x_RD, self._weight_DO, self._row_tile)


def tiled_mm(x_RD: Tensor, weight_DO: Tensor, row_tile: int) -> Tensor:
    """Multiply in products of exactly `row_tile` rows, the last one padded with zeros."""
    num_rows = x_RD.shape[0]
    padded = functional.pad(x_RD, (0, 0, 0, -num_rows % row_tile))
    if not num_rows:
        return torch.mm(padded, weight_DO)
    return torch.cat(
        [torch.mm(tile, weight_DO) for tile in torch.chunk(padded, padded.shape[0] // row_tile)]
    )[:num_rows]


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), in float32, over the last dimension.

    The published norms are zero-centred (offset 1) except that of the delta net (offset 0). A norm
    per head takes `weight` of shape [heads, size]. Written with a vector norm and `hypot`, which is
    four operations where the definition needs six.
    """

    def __init__(self, weight: Tensor, eps: float, *, offset: float = 1.0) -> None:
        size = weight.shape[-1]
        self._scale = (weight.float() + offset) * size**0.5
        self._floor = torch.tensor((eps * size) ** 0.5, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised rows, float32."""
        return normalize(x, self._floor).mul_(self._scale)


def normalize(x: Tensor, floor: Tensor) -> Tensor:
    """Return x / sqrt(|x|^2 + floor^2) over the last dimension, float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.div(x, torch.hypot(length, floor))


class VocabularyEmbedding:
    """Token embeddings of which each rank of a group holds its part of the vocabulary."""

    def __init__(self, weight_VD: Tensor, vocab_start: int, *, whole: bool) -> None:
        self._weight_VD = weight_VD
        self._start = vocab_start
        self._whole = whole

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """Return this rank's share [T, D]: zero rows for the tokens that others hold."""
        if self._whole:
            return self._weight_VD.index_select(0, token_ids_T)
        local_T = token_ids_T - self._start
        held_T = (local_T >= 0) & (local_T < self._weight_VD.shape[0])
        x_TD = self._weight_VD.index_select(0, local_T.masked_fill(~held_T, 0))
        return x_TD.masked_fill_(~held_T[:, None], 0)
