"""What the operator may set about a gateway, and what one rank then takes."""

from dataclasses import dataclass, field

import torch

from workers.dispatch.options import DispatchOptions
from workers.errors import ConfigError
from workers.gateway.kv import blocks_for
from workers.gateway.prefix_cache import PrefixOptions
from workers.gateway.scheduler import SchedulerOptions
from workers.model.batch import CHUNK_TOKENS
from workers.model.cache import kv_bytes_per_token, state_bytes_per_sequence
from workers.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """Limits and modes of a gateway, the same for all its ranks.

    Zeros are worked out from the model: `context_tokens` is then the model's context, and
    `num_kv_blocks` holds a quarter of a context for each of `max_sequences`, and never less than
    one whole context. `dtype` "auto" is float32 on CPU and bfloat16 on GPU. With `local_experts`
    every rank holds all routed experts itself. `group_timeout_s` bounds a collective between the
    ranks; a week, since a rank waits in one for as long as another's rows are parked. A rank that
    dies is noticed at once, one that is frozen or cut off after `sibling_silence_s`. For
    `snapshot_tokens` and `snapshot_token_bytes` see `snapshot_interval`.

    The prefix cache keeps up to `prefix_kv_bytes` of KV beside what running sequences hold, and
    `prefix_state_bytes` of states, a rank. Zeros are all KV that these leave free, and as many
    states as sequences can run. States lie on the `device`, or in host memory.
    """

    max_sequences: int = 32
    step_tokens: int = 512
    block_tokens: int = 16
    num_kv_blocks: int = 0
    max_waiting: int = 1024
    context_tokens: int = 0
    local_experts: bool = False
    bit_stable: bool = False
    micro_batches: int = 1
    dtype: str = "auto"
    device: str = "cpu"
    num_threads: int = 1
    prefix_cache: bool = True
    prefix_kv_bytes: int = 0
    prefix_state_bytes: int = 0
    prefix_states_on_host: bool = False
    group_timeout_s: float = 7 * 86400.0
    snapshot_tokens: int = 0
    snapshot_token_bytes: int = 0
    sibling_silence_s: float = 3.0
    dispatch: DispatchOptions = field(default_factory=DispatchOptions)

    def __post_init__(self) -> None:
        least = self.max_sequences + (CHUNK_TOKENS - 1 if self.bit_stable else 0)
        if self.step_tokens < least:
            raise ConfigError(
                f"step_tokens: {self.step_tokens} cannot hold a decoded token for each of "
                f"{self.max_sequences} sequences and a prefill chunk; at least {least}"
            )
        if self.dtype not in {"auto", "float32", "bfloat16"}:
            raise ConfigError(f"dtype: {self.dtype!r} is not one of auto, float32, bfloat16")
        for name in ("max_sequences", "block_tokens", "micro_batches", "num_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is below 1")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        name = self.dtype
        if name == "auto":
            name = "float32" if torch.device(self.device).type == "cpu" else "bfloat16"
        return torch.float32 if name == "float32" else torch.bfloat16

    def context_of(self, config: ModelConfig) -> int:
        """Return the most tokens that prompt and completion may have together.

        Raises:
            ConfigError: More is asked for than the model has positions for.
        """
        if self.context_tokens > config.max_context_tokens:
            raise ConfigError(
                f"context_tokens: {self.context_tokens} is more than the model's "
                f"{config.max_context_tokens}"
            )
        return self.context_tokens or config.max_context_tokens

    def scheduler_options(self, config: ModelConfig, size: int) -> SchedulerOptions:
        """Return the budgets of a step of `size` ranks, with what is worked out from the model."""
        context = self.context_of(config)
        whole = blocks_for(context, self.block_tokens)
        quarter = blocks_for(context // 4, self.block_tokens)
        return SchedulerOptions(
            step_tokens=self.step_tokens,
            max_sequences=self.max_sequences,
            block_tokens=self.block_tokens,
            num_kv_blocks=self.num_kv_blocks or max(whole, self.max_sequences * quarter),
            bit_stable=self.bit_stable,
            prefix=self._prefix_options(config, size),
        )

    def kv_block_bytes(self, config: ModelConfig, size: int) -> int:
        """Return the bytes of one KV block on one of `size` ranks."""
        return self.block_tokens * kv_bytes_per_token(config, size, self.compute_dtype)

    def _prefix_options(self, config: ModelConfig, size: int) -> PrefixOptions:
        if not self.prefix_cache:
            return PrefixOptions()
        state_bytes = state_bytes_per_sequence(config, size, self.compute_dtype)
        num_places = self.prefix_state_bytes // state_bytes or self.max_sequences
        max_idle_blocks = None
        if self.prefix_kv_bytes:
            max_idle_blocks = self.prefix_kv_bytes // self.kv_block_bytes(config, size)
        return PrefixOptions(num_places=num_places, max_idle_blocks=max_idle_blocks)
