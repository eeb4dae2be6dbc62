"""How many bytes a gateway takes: on each rank, and of what it keeps for other gateways."""

from dataclasses import dataclass

from workers.gateway.options import GatewayOptions
from workers.gateway.snapshot_store import KEPT
from workers.model.cache import kv_bytes_per_token, state_bytes_per_sequence
from workers.model.config import ModelConfig
from workers.model.memory import expert_bytes, rank_bytes

STEP_COPIES = 2  # of a running sequence's states beside its block: what a step reads and writes
_EXAMPLE_TOKENS = 1024  # of a sequence that nobody calls long
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes that one rank has taken, and that steps take on top: `step_bytes` at most.

    KV of the prefix cache is in `kv_bytes`, its states are `checkpoint_bytes`.
    """

    weights_bytes: int
    experts_bytes: int
    kv_bytes: int
    state_bytes: int
    checkpoint_bytes: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it; messages, activations and libraries come on top."""
        return (
            self.weights_bytes
            + self.experts_bytes
            + self.kv_bytes
            + self.state_bytes
            + self.checkpoint_bytes
            + self.step_bytes
        )


def rank_memory(
    config: ModelConfig, options: GatewayOptions, *, rank: int, size: int
) -> MemoryReport:
    """Return what one of `size` ranks takes."""
    dtype = options.compute_dtype
    limits = options.scheduler_options(config, size)
    state_bytes = state_bytes_per_sequence(config, size, dtype)
    num_experts = config.num_layers * config.num_experts if options.local_experts else 0
    return MemoryReport(
        weights_bytes=rank_bytes(config, rank, size, dtype),
        experts_bytes=num_experts * expert_bytes(config, dtype),
        kv_bytes=limits.num_kv_blocks * options.kv_block_bytes(config, size),
        state_bytes=options.max_sequences * state_bytes,
        checkpoint_bytes=limits.prefix.num_places * state_bytes,
        step_bytes=STEP_COPIES * options.max_sequences * state_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDemand:
    """What one gateway's running sequences take at the gateway that keeps their snapshots.

    `state_bytes` are one sequence's states, of all ranks together, and `num_copies` how often they
    are there; `token_bytes` are one token's keys and values, which are there once. As many as
    `max_sequences` run, with `max_tokens` together unless they share prompts: each snapshot has the
    rows of the whole prompt.
    """

    state_bytes: int
    num_copies: int
    token_bytes: int
    max_sequences: int
    max_tokens: int

    @property
    def gateway_bytes(self) -> int:
        """Bytes of all that one gateway may run."""
        states = self.max_sequences * self.num_copies * self.state_bytes
        return states + self.max_tokens * self.token_bytes

    @property
    def fair_store_bytes(self) -> int:
        """What the store of a gateway should have for one other gateway: whole MiB."""
        return -(-self.gateway_bytes // _MIB) * _MIB

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes of one sequence of so many tokens."""
        return self.num_copies * self.state_bytes + num_tokens * self.token_bytes

    def num_held(self, store_bytes: int, num_tokens: int) -> int:
        """How many sequences of so many tokens a store holds."""
        return store_bytes // self.sequence_bytes(num_tokens)


def snapshot_demand(config: ModelConfig, options: GatewayOptions, size: int) -> SnapshotDemand:
    """Return what a gateway of `size` ranks takes of the one that keeps its snapshots.

    Where ranks are several, their parts of the next snapshot wait there for each other.
    """
    limits = options.scheduler_options(config, size)
    dtype = options.compute_dtype
    return SnapshotDemand(
        state_bytes=state_bytes_per_sequence(config, 1, dtype),
        num_copies=KEPT + (size > 1),
        token_bytes=kv_bytes_per_token(config, 1, dtype),
        max_sequences=limits.max_sequences,
        max_tokens=limits.num_kv_blocks * limits.block_tokens,
    )


def store_shortage(demand: SnapshotDemand, options: GatewayOptions, store_bytes: int) -> str:
    """Say what a store lacks for one other gateway, and what it should be; empty if nothing."""
    if not options.snapshot_tokens or store_bytes >= demand.gateway_bytes:
        return ""
    mean_tokens = demand.max_tokens // demand.max_sequences
    few, many = (demand.num_held(store_bytes, n) for n in (_EXAMPLE_TOKENS, mean_tokens))
    return (
        f"gateways.snapshot_store_bytes: the {demand.max_sequences:,} sequences that another "
        f"gateway may run take {readable(demand.gateway_bytes)}, and {readable(store_bytes)} has "
        f"room for {few:,} of {_EXAMPLE_TOKENS:,} tokens each, or {many:,} of {mean_tokens:,}. "
        "When that gateway dies, the others are computed again from the prompt. Set it "
        f"to {demand.fair_store_bytes} where host memory allows, or lower gateways.max_sequences "
        "and gateways.kv_blocks"
    )


def readable(num_bytes: int) -> str:
    """Return bytes in the unit that suits them."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{num_bytes} B"
