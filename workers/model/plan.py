"""Which slices of which published tensors a gateway rank or an expert worker loads.

Pure: names and shapes alone, so that the plan of a model of any size is made without its weights. A
parameter of `workers.model.parameters` is the concatenation, along its rows, of the pieces that the
plan lists under its field name.

Tensor parallelism follows Megatron: projections into heads are split by rows, projections out of
heads by columns, the vocabulary by rows. The DeltaNet's q, k and v share one tensor and are split
each for itself, so that a rank's value heads keep their key head. Where ranks outnumber KV heads, a
KV head is held by several ranks. Every rank computes gate and shared expert for its own rows, so
these are whole on each, like the norms.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from workers.model.config import LayerType, ModelConfig

PREFIXES = ("model.language_model.", "model.")
SCALE_SUFFIX = "_scale_inv"
# Parameters that decide values in float32 and are held so, whatever the compute dtype.
FLOAT32_FIELDS = frozenset(
    {"input_norm", "post_norm", "norm", "q_norm", "k_norm", "a_log", "dt_bias"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A slice of one published tensor, and how many ranks of the group hold this same slice.

    `shape` is the whole tensor's; `index` has one slice for each of its dimensions.
    """

    tensor: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    copies: int = 1

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        return tuple(s.stop - s.start for s in self.index)

    @property
    def num_elements(self) -> int:
        """Elements in the slice."""
        return math.prod(self.slice_shape)

    @property
    def scale_tensor(self) -> str:
        """Name of the scales that this tensor has when it is published in block FP8."""
        return self.tensor + SCALE_SUFFIX


Parameters = dict[str, tuple[Piece, ...]]  # field name -> pieces, to be joined along rows


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint names its tensors: their prefix, and whether a layer's experts are fused."""

    prefix: str
    fused_experts: bool

    @classmethod
    def find(cls, names: Collection[str]) -> "Layout":
        """Recognize the layout; where nothing fits, the plainest, of which tensors are missing."""
        prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in names), PREFIXES[-1])
        split = f"{prefix}layers.0.mlp.experts.0.gate_proj.weight"
        return cls(prefix, fused_experts=split not in names)


def scale_index(index: tuple[slice, ...], block_size: tuple[int, int]) -> tuple[slice, ...]:
    """Return the slice of the scales that covers a slice of block FP8 weights."""
    return index[:-2] + tuple(
        slice(s.start // block, -(-s.stop // block))
        for s, block in zip(index[-2:], block_size, strict=True)
    )


def scale_shape(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a block FP8 tensor: the last blocks may be partial."""
    return shape[:-2] + tuple(-(-n // b) for n, b in zip(shape[-2:], block_size, strict=True))


def expert_plan(config: ModelConfig, layout: Layout, layer: int, expert: int) -> Parameters:
    """Return the pieces of one routed expert, by field of ExpertParameters."""
    experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    base = f"{layout.prefix}layers.{layer}.mlp.experts."
    if layout.fused_experts:
        one = slice(expert, expert + 1)
        return {
            "gate_up": (_at(base + "gate_up_proj", (experts, 2 * width, hidden), one),),
            "down": (_at(base + "down_proj", (experts, hidden, width), one),),
        }
    return {
        "gate_up": (
            _at(f"{base}{expert}.gate_proj.weight", (width, hidden)),
            _at(f"{base}{expert}.up_proj.weight", (width, hidden)),
        ),
        "down": (_at(f"{base}{expert}.down_proj.weight", (hidden, width)),),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What one rank of a tensor-parallel group of `size` loads."""

    config: ModelConfig
    layout: Layout
    rank: int = 0
    size: int = 1

    def embedding(self) -> Parameters:
        """Pieces outside the layers: `embed`, `norm`, and `head` unless it is tied to `embed`."""
        c = self.config
        vocabulary = (c.vocab_size, c.hidden_size)
        rows = slice(*(min(n, c.vocab_size) for n in self.vocab_rows))
        plan: Parameters = {
            "embed": (_at(f"{self.layout.prefix}embed_tokens.weight", vocabulary, rows),),
            "norm": (self._whole(f"{self.layout.prefix}norm.weight", (c.hidden_size,)),),
        }
        if not c.tie_word_embeddings:
            plan["head"] = (_at("lm_head.weight", vocabulary, rows),)
        return plan

    @property
    def vocab_rows(self) -> tuple[int, int]:
        """First token id of this rank and the one behind its last, padding included."""
        share = -(-self.config.vocab_size // self.size)
        return self.rank * share, (self.rank + 1) * share

    def norms(self, layer: int) -> Parameters:
        """Pieces of a layer's own fields."""
        base, shape = self._base(layer), (self.config.hidden_size,)
        return {
            "input_norm": (self._whole(f"{base}input_layernorm.weight", shape),),
            "post_norm": (self._whole(f"{base}post_attention_layernorm.weight", shape),),
        }

    def mixer(self, layer: int) -> Parameters:
        """Pieces of a layer's attention or DeltaNet."""
        if self.config.layer_types[layer] is LayerType.FULL:
            return self._attention(self._base(layer) + "self_attn.")
        return self._delta_net(self._base(layer) + "linear_attn.")

    def moe(self, layer: int) -> Parameters:
        """Pieces of a layer's gate and shared expert."""
        c, base = self.config, self._base(layer) + "mlp."
        hidden, width = c.hidden_size, c.shared_expert_intermediate_size
        shared = base + "shared_expert."
        return {
            "gate": (self._whole(f"{base}gate.weight", (c.num_experts, hidden)),),
            "shared_gate_up": (
                self._whole(f"{shared}gate_proj.weight", (width, hidden)),
                self._whole(f"{shared}up_proj.weight", (width, hidden)),
            ),
            "shared_down": (self._whole(f"{shared}down_proj.weight", (hidden, width)),),
            "shared_gate": (self._whole(f"{base}shared_expert_gate.weight", (1, hidden)),),
        }

    def parameters(self) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        """Yield the field name and the pieces of everything of this rank."""
        yield from self.embedding().items()
        for layer in range(self.config.num_layers):
            for part in (self.norms(layer), self.mixer(layer), self.moe(layer)):
                yield from part.items()

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of everything of this rank."""
        for _, pieces in self.parameters():
            yield from pieces

    def _attention(self, base: str) -> Parameters:
        c = self.config
        heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_kv_heads * c.head_dim
        kv = self._kv_heads()
        kv_rows = slice(kv.start * c.head_dim, kv.stop * c.head_dim)
        kv_copies = max(1, self.size // c.num_kv_heads)
        head_norm = (c.head_dim,)
        return {
            "q_gate": (
                _at(f"{base}q_proj.weight", (2 * heads, c.hidden_size), self._share(2 * heads)),
            ),
            "k": (
                _at(f"{base}k_proj.weight", (kv_heads, c.hidden_size), kv_rows, copies=kv_copies),
            ),
            "v": (
                _at(f"{base}v_proj.weight", (kv_heads, c.hidden_size), kv_rows, copies=kv_copies),
            ),
            "o": (_at(f"{base}o_proj.weight", (c.hidden_size, heads), _ALL, self._share(heads)),),
            "q_norm": (self._whole(f"{base}q_norm.weight", head_norm),),
            "k_norm": (self._whole(f"{base}k_norm.weight", head_norm),),
        }

    def _delta_net(self, base: str) -> Parameters:
        c = self.config
        keys, values, heads = c.linear_key_size, c.linear_value_size, c.linear_num_value_heads
        channels = 2 * keys + values
        segments = (
            self._share(keys),
            self._share(keys, start=keys),
            self._share(values, start=2 * keys),
        )
        qkv = (channels, c.hidden_size)
        conv = (channels, 1, c.linear_conv_kernel)
        head = self._share(heads)
        return {
            "qkv": tuple(_at(f"{base}in_proj_qkv.weight", qkv, rows) for rows in segments),
            "z": (_at(f"{base}in_proj_z.weight", (values, c.hidden_size), self._share(values)),),
            "b": (_at(f"{base}in_proj_b.weight", (heads, c.hidden_size), head),),
            "a": (_at(f"{base}in_proj_a.weight", (heads, c.hidden_size), head),),
            "conv": tuple(_at(f"{base}conv1d.weight", conv, rows) for rows in segments),
            "a_log": (_at(f"{base}A_log", (heads,), head),),
            "dt_bias": (_at(f"{base}dt_bias", (heads,), head),),
            "norm": (self._whole(f"{base}norm.weight", (c.linear_value_head_dim,)),),
            "out": (
                _at(f"{base}out_proj.weight", (c.hidden_size, values), _ALL, self._share(values)),
            ),
        }

    def _base(self, layer: int) -> str:
        return f"{self.layout.prefix}layers.{layer}."

    def _kv_heads(self) -> slice:
        """KV heads of this rank: its share, or the one that its query heads attend to."""
        heads = self.config.num_kv_heads
        if self.size <= heads:
            return self._share(heads)
        head = self.rank * heads // self.size
        return slice(head, head + 1)

    def _share(self, total: int, start: int = 0) -> slice:
        """This rank's part of `total` rows or columns that begin at `start`."""
        share = total // self.size
        return slice(start + self.rank * share, start + (self.rank + 1) * share)

    def _whole(self, tensor: str, shape: tuple[int, ...]) -> Piece:
        return _at(tensor, shape, copies=self.size)


_ALL = slice(None)


def _at(tensor: str, shape: tuple[int, ...], *index: slice, copies: int = 1) -> Piece:
    """Make a piece; dimensions that are not named are whole."""
    padded = index + (_ALL,) * (len(shape) - len(index))
    bounds = (slice(*s.indices(n)[:2]) for s, n in zip(padded, shape, strict=True))
    return Piece(tensor=tensor, shape=shape, index=tuple(bounds), copies=copies)
