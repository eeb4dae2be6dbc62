"""Step plans for kernel tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.model.batch import Segment
from workers.model.step import StepOptions, StepPlan, plan_step

BLOCK_TOKENS = 4
BLOCKS_PER_SEQUENCE = 70
OPTIONS = StepOptions(
    rank=0, size=1, block_tokens=BLOCK_TOKENS, bit_stable=False, device=torch.device("cpu")
)


class NoRotation:
    """Positions are not what these tests are about."""

    def rotations(self, positions_R: Tensor) -> Tensor:
        return positions_R[:, None, None]


class CacheShape:
    """What kernels read of a cache."""

    def __init__(self, conv_window: int = 3) -> None:
        self.block_tokens = BLOCK_TOKENS
        self.conv_window = conv_window


def segment(sequence: int, start: int, num_tokens: int, num_logits: int = 1) -> Segment:
    """Tokens of one sequence, whose KV blocks lie backwards."""
    first = sequence * BLOCKS_PER_SEQUENCE
    return Segment(
        token_ids=tuple(range(start, start + num_tokens)),
        start=start,
        state_block=sequence,
        kv_blocks=tuple(reversed(range(first, first + BLOCKS_PER_SEQUENCE))),
        num_logits=num_logits,
    )


def plan(segments: Sequence[Segment], options: StepOptions = OPTIONS) -> StepPlan:
    return plan_step(segments, NoRotation(), options)
