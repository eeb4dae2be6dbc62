"""From a checkpoint to the parameters of one gateway rank or one expert.

Weights come out in the compute dtype and on the compute device; block FP8 is multiplied out. What
decides values in float32 everywhere (norms, decay rates) stays float32.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.model.checkpoint import Checkpoint
from workers.model.config import LayerType, ModelConfig, read_json, token_ids
from workers.model.parameters import (
    AttentionParameters,
    DecoderParameters,
    DeltaNetParameters,
    ExpertParameters,
    LayerParameters,
    MoeParameters,
)
from workers.model.plan import Layout, Parameters, Piece, RankPlan, expert_plan, scale_index

_FLOAT32 = frozenset({"input_norm", "post_norm", "norm", "q_norm", "k_norm", "a_log", "dt_bias"})


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    rank: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderParameters:
    """Load what one rank of a tensor-parallel group of `size` holds: all but the routed experts."""
    config.check_tensor_parallel(size)
    plan = RankPlan(config=config, layout=Layout.find(checkpoint.tensors), rank=rank, size=size)
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
    """Load one routed expert and nothing else."""
    plan = expert_plan(config, Layout.find(checkpoint.tensors), layer, expert)
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
            name: self._join(pieces, torch.float32 if name in _FLOAT32 else self.dtype)
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
        published = read_json(path) if path.exists() else {}

        def number(key: str, default: float, low: float, high: float) -> float:
            value = published.get(key)
            value = default if value is None else value
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not low <= value <= high
            ):
                raise CheckpointError(
                    f"{path.name}: {key} is {value!r}; supported: {low} to {high}"
                )
            return value

        ends = token_ids(published.get("eos_token_id")) or ModelConfig.load(directory).eos_token_ids
        return cls(
            temperature=number("temperature", 1.0, 0, 100) if published.get("do_sample") else 0.0,
            top_p=number("top_p", 1.0, 0, 1),
            top_k=int(number("top_k", 0, 0, 2**31)),
            min_p=number("min_p", 0.0, 0, 1),
            repetition_penalty=number("repetition_penalty", 1.0, 0.01, 100),
            eos_token_ids=ends,
        )
