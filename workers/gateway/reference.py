"""The whole model in one process, driven by hand: the definition of right, and a yardstick."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from workers.dispatch.base import Dispatcher
from workers.gateway.kv import blocks_for
from workers.gateway.options import GatewayOptions
from workers.gateway.rank import load_rank
from workers.mesh import TensorParallelGroup
from workers.model.batch import Segment, StepBatch
from workers.model.config import ModelConfig


class Reference:
    """A decoder of one rank, and room for sequences that the caller numbers from 0.

    Experts run in this process, unless a `dispatcher` sends rows elsewhere.
    """

    def __init__(
        self,
        directory: Path,
        *,
        context_tokens: int,
        num_sequences: int = 1,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        self.config = ModelConfig.load(directory)
        options = GatewayOptions(
            context_tokens=context_tokens,
            max_sequences=num_sequences,
            num_kv_blocks=num_sequences * blocks_for(context_tokens, GatewayOptions().block_tokens),
            local_experts=dispatcher is None,
            prefix_cache=False,
        )
        self._block_tokens = options.block_tokens
        self._blocks = options.num_kv_blocks // num_sequences
        self._rank = load_rank(directory, self.config, options, TensorParallelGroup(), dispatcher)

    def step(
        self, work: Sequence[tuple[int, Sequence[int], int]], *, num_logits: int = 1
    ) -> Tensor:
        """Compute and commit (sequence, new tokens, position of the first) of several sequences.

        Returns float32 logits of the last `num_logits` rows of each, one sequence after the other.
        """
        segments = tuple(
            Segment(
                token_ids=tuple(tokens),
                start=start,
                state_block=sequence,
                kv_blocks=tuple(
                    sequence * self._blocks + block
                    for block in range(blocks_for(start + len(tokens), self._block_tokens))
                ),
                num_logits=num_logits,
            )
            for sequence, tokens, start in work
        )
        logits = self._rank.forward(StepBatch(segments=segments))
        self._rank.cache.commit()
        return logits
