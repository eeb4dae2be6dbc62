"""The tensors of one gateway rank and of one expert, as the layers want them.

All weights are in the compute dtype, except norms, A_log and dt_bias, which are float32. Linear
weights keep the published orientation [out, in]. Shape legend: D hidden, V vocabulary rows of this
rank, H attention heads, G KV heads, C head size, KH / VH key and value heads of the delta net, DK /
DV their sizes, E experts, I expert width, J shared expert width; all head counts are this rank's.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParameters:
    """Gated full attention; `q_gate` holds, per head, C query rows and then C gate rows."""

    q_gate: Tensor  # [H * 2 * C, D]
    k: Tensor  # [G * C, D]
    v: Tensor  # [G * C, D]
    o: Tensor  # [D, H * C]
    q_norm: Tensor  # [C]
    k_norm: Tensor  # [C]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetParameters:
    """Gated DeltaNet; `qkv` and `conv` hold the rows of q, then k, then v."""

    qkv: Tensor  # [2 * KH * DK + VH * DV, D]
    z: Tensor  # [VH * DV, D]
    b: Tensor  # [VH, D]
    a: Tensor  # [VH, D]
    conv: Tensor  # [2 * KH * DK + VH * DV, kernel]
    a_log: Tensor  # [VH]
    dt_bias: Tensor  # [VH]
    norm: Tensor  # [DV]
    out: Tensor  # [D, VH * DV]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeParameters:
    """What of the mixture of experts lives on the gateway; whole on every rank."""

    gate: Tensor  # [E, D]
    shared_gate_up: Tensor  # [2 * J, D], gate rows first
    shared_down: Tensor  # [D, J]
    shared_gate: Tensor  # [1, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParameters:
    """One decoder layer."""

    input_norm: Tensor  # [D]
    post_norm: Tensor  # [D]
    mixer: AttentionParameters | DeltaNetParameters
    moe: MoeParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParameters:
    """Everything of one gateway rank. `head` is `embed` itself when the embeddings are tied.

    `vocab_start` is the first token id of this rank's rows. The last rank's rows are padded with
    zeros where the vocabulary does not divide; logits beyond the vocabulary are cut off.
    """

    embed: Tensor  # [V, D]
    layers: tuple[LayerParameters, ...]
    norm: Tensor  # [D]
    head: Tensor  # [V, D]
    vocab_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParameters:
    """One routed expert: down(silu(gate) * up), with `gate_up` holding the gate rows first."""

    gate_up: Tensor  # [2 * I, D]
    down: Tensor  # [D, I]
