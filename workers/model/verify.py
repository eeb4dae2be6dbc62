"""Whether a checkpoint holds what its configuration asks for, decided from headers alone."""

from collections.abc import Iterable, Iterator

import torch

from workers.errors import CheckpointError
from workers.model.checkpoint import Checkpoint, TensorInfo
from workers.model.config import ModelConfig
from workers.model.plan import SCALE_SUFFIX, Layout, Piece, RankPlan, expert_plan, scale_shape

_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
_SUPPORTED = "bfloat16, float16, float32, float8_e4m3fn"
_FP8 = torch.float8_e4m3fn
_NOT_SERVED = ("mtp.", "model.visual.", "visual.")  # the draft head and the vision tower
_MAX_PROBLEMS = 8


def verify(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check that every tensor of the text model is there as the configuration says, and no other.

    Reads no weights. Tensors of the draft head and of the vision tower are ignored.

    Raises:
        CheckpointError: Tensors are missing, misshapen, of an unsupported type, or belong to a
            model that the configuration does not describe. Names the first of them with file.
    """
    layout = Layout.find(checkpoint.tensors)
    pieces = {piece.tensor: piece for piece in _all_pieces(config, layout)}
    check_pieces(checkpoint, config, pieces.values())
    unknown = [
        f"{checkpoint.directory / info.file}: tensor {name} belongs to no part of this model"
        for name, info in checkpoint.tensors.items()
        if name.removesuffix(SCALE_SUFFIX) not in pieces
        and not name.startswith(_NOT_SERVED)
        and not (name == "lm_head.weight" and config.tie_word_embeddings)
    ]
    _refuse(unknown)


def check_pieces(checkpoint: Checkpoint, config: ModelConfig, pieces: Iterable[Piece]) -> None:
    """Check the tensors of some pieces; raises CheckpointError naming tensors and files."""
    _refuse([p for piece in pieces for p in _problems(checkpoint, config, piece)])


def _all_pieces(config: ModelConfig, layout: Layout) -> Iterator[Piece]:
    yield from RankPlan(config=config, layout=layout).pieces()
    for layer in range(config.num_layers):
        for expert in range(1 if layout.fused_experts else config.num_experts):
            for pieces in expert_plan(config, layout, layer, expert).values():
                yield from pieces


def _problems(checkpoint: Checkpoint, config: ModelConfig, piece: Piece) -> Iterator[str]:
    info = checkpoint.tensors.get(piece.tensor)
    if info is None:
        yield f"{checkpoint.directory}: no tensor {piece.tensor} of shape {list(piece.shape)}"
        return
    where = f"{checkpoint.directory / info.file}: tensor {piece.tensor}"
    if info.shape != piece.shape:
        yield f"{where} has shape {list(info.shape)}; config.json asks for {list(piece.shape)}"
    if info.dtype is _FP8:
        yield from _fp8_problems(checkpoint, config, piece, where)
    elif info.dtype not in _PLAIN:
        yield f"{where} has dtype {info.dtype}; supported: {_SUPPORTED}"
    elif piece.scale_tensor in checkpoint.tensors:
        yield f"{where} has dtype {info.dtype} and yet scales, {piece.scale_tensor}"


def _fp8_problems(
    checkpoint: Checkpoint, config: ModelConfig, piece: Piece, where: str
) -> Iterator[str]:
    if config.quantization is None:
        yield f"{where} is FP8, but config.json has no quantization_config"
        return
    if piece.tensor.removesuffix(".weight") in config.quantization.modules_to_not_convert:
        yield f"{where} is FP8, but modules_to_not_convert names it"
    scale: TensorInfo | None = checkpoint.tensors.get(piece.scale_tensor)
    if scale is None or len(piece.shape) < 2:
        yield f"{where} is FP8 without its scales, {piece.scale_tensor}"
        return
    shape = scale_shape(piece.shape, config.quantization.block_size)
    if scale.shape != shape or scale.dtype not in _PLAIN:
        yield (
            f"{checkpoint.directory / scale.file}: scales {piece.scale_tensor} have dtype "
            f"{scale.dtype} and shape {list(scale.shape)}; expected bfloat16 or float32 and "
            f"{list(shape)}"
        )


def _refuse(problems: list[str]) -> None:
    if problems:
        more = len(problems) - _MAX_PROBLEMS
        shown = problems[:_MAX_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise CheckpointError("; ".join(shown))
