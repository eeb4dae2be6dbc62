"""From a checkpoint to the parameters of one gateway rank or one expert.

Weights come out in the compute dtype and on the compute device; block FP8 is multiplied out. What
decides values in float32 everywhere (norms, decay rates) stays float32.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.model.checkpoint import Checkpoint
from workers.model.config import LayerType, ModelConfig
from workers.model.parameters import (
    AttentionParameters,
    DecoderParameters,
    DeltaNetParameters,
    ExpertParameters,
    LayerParameters,
    MoeParameters,
)
from workers.model.plan import (
    FLOAT32_FIELDS,
    Layout,
    Parameters,
    Piece,
    RankPlan,
    expert_plan,
    scale_index,
)
from workers.model.published import Section, read_json
from workers.model.verify import check_pieces


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    rank: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderParameters:
    """Load what one rank of a tensor-parallel group of `size` holds: all but the routed experts.

    Raises ConfigError when `size` ranks cannot share the heads, and CheckpointError, before any
    weight is read, when a tensor is missing or is not what the configuration says.
    """
    config.check_tensor_parallel(size)
    plan = RankPlan(config=config, layout=Layout.find(checkpoint.tensors), rank=rank, size=size)
    check_pieces(checkpoint, config, plan.pieces())
    load = _Loader(checkpoint, config, dtype, device)

    def layer(index: int) -> LayerParameters:
        full = config.layer_types[index] is LayerType.FULL
        mixer = load(plan.mixer(index))
        return LayerParameters(
            **load(plan.norms(index)),
            mixer=AttentionParameters(**mixer) if full else DeltaNetParameters(**mixer),
            moe=MoeParameters(**load(plan.moe(index))),
        )

    outer = load(plan.embedding())
    first, behind = plan.vocab_rows
    embed = _pad_rows(outer["embed"], behind - first)
    head = embed if config.tie_word_embeddings else _pad_rows(outer["head"], behind - first)
    return DecoderParameters(
        embed=embed,
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=outer["norm"],
        head=head,
        vocab_start=first,
    )


def load_expert(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer: int,
    expert: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ExpertParameters:
    """Load one routed expert and nothing else.

    Raises CheckpointError, before any weight is read, when one of its tensors is missing or is not
    what the configuration says.
    """
    plan = expert_plan(config, Layout.find(checkpoint.tensors), layer, expert)
    check_pieces(checkpoint, config, itertools.chain.from_iterable(plan.values()))
    return ExpertParameters(**_Loader(checkpoint, config, dtype, device)(plan))


@dataclass(frozen=True, slots=True)
class _Loader:
    """Turns a plan's pieces into parameters."""

    checkpoint: Checkpoint
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def __call__(self, parameters: Parameters) -> dict[str, Tensor]:
        return {
            name: self._join(pieces, torch.float32 if name in FLOAT32_FIELDS else self.dtype)
            for name, pieces in parameters.items()
        }

    def _join(self, pieces: tuple[Piece, ...], dtype: torch.dtype) -> Tensor:
        read = [self._read(piece).to(device=self.device, dtype=dtype) for piece in pieces]
        return read[0] if len(read) == 1 else torch.cat(read)

    def _read(self, piece: Piece) -> Tensor:
        weight = self.checkpoint.read(piece.tensor, piece.index)
        if weight.dtype is torch.float8_e4m3fn:
            weight = self._multiply_out(piece, weight)
        # One expert of a fused tensor and the convolution's middle dimension: [1, R, C], [R, 1, C].
        return weight.flatten(0, 1) if weight.dim() == 3 else weight

    def _multiply_out(self, piece: Piece, weight: Tensor) -> Tensor:
        assert self.config.quantization is not None, piece.tensor
        block_size = self.config.quantization.block_size
        index = scale_index(piece.index, block_size)
        scale = self.checkpoint.read(piece.scale_tensor, index).float()
        rows, columns = (
            torch.arange(s.start, s.stop) // block - s.start // block
            for s, block in zip(piece.index[-2:], block_size, strict=True)
        )
        return weight.float() * scale[..., rows[:, None], columns]


def _pad_rows(x_VD: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - x_VD.shape[0]
    return x_VD if missing == 0 else torch.cat([x_VD, x_VD.new_zeros(missing, x_VD.shape[1])])


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """How a checkpoint wants tokens to be chosen when a request does not say.

    A temperature of 0 is greedy; `top_k` 0 and `top_p` 1 mean no limit.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> "GenerationDefaults":
        """Read generation_config.json; without one, greedy with the end ids of config.json.

        Without `do_sample` decoding is greedy, as in transformers. Raises CheckpointError for a
        value that is out of its range.
        """
        path = Path(directory) / "generation_config.json"
        published = read_json(path) if path.exists() else Section({}, str(path))
        ends = published.token_ids("eos_token_id")
        sampled = published.choice("do_sample", (True, False, None)) is True
        return cls(
            temperature=published.number("temperature", 1.0, zero=True) if sampled else 0.0,
            top_p=published.number("top_p", 1.0, maximum=1),
            top_k=published.integer("top_k", 0, minimum=0),
            min_p=published.number("min_p", 0.0, zero=True, maximum=1),
            repetition_penalty=published.number("repetition_penalty", 1.0),
            eos_token_ids=ends or ModelConfig.load(directory).eos_token_ids,
        )
