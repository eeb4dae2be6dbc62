"""What the operator may set about dispatch, and what both ends of a link agree on."""

import json
from dataclasses import asdict, dataclass, fields
from enum import Enum

import torch

from workers.errors import ConfigError, DispatchError

MAX_TOP_K = 32  # a reply names the experts of a row in one 32-bit mask

MAX_LINKS = 128  # of a process: each is a connection, threads and buffers


class Transport(Enum):
    """What carries the rows: Gloo over host memory, or NCCL between GPUs."""

    GLOO = "gloo"
    NCCL = "nccl"


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageShape:
    """The shape of one row: its hidden size, how many experts it may name, its dtype."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ConfigError(f"top_k: {self.top_k} is not within 1..{MAX_TOP_K}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchOptions:
    """How a gateway rank talks to its expert workers.

    A call that is not answered within its deadline makes the worker suspect. The deadline is
    `deadline_factor` times the 99th percentile of the worker's answers, at least `min_deadline_s`;
    while nothing is known of it, a few times that of another one, at most `first_deadline_s`. A
    link on which nothing arrives for `link_timeout_s` is broken; idle ones are pinged three times
    as often.
    """

    transport: Transport = Transport.GLOO
    device: str = "cpu"
    bit_stable: bool = False
    capacity_rows: int = 512
    num_buffers: int = 4
    first_deadline_s: float = 2.0
    min_deadline_s: float = 0.05
    deadline_factor: float = 10.0
    link_timeout_s: float = 30.0
    connect_timeout_s: float = 10.0
    reconnect_s: float = 0.05
    max_reconnect_s: float = 2.0
    stale_retry_s: float = 0.2
    max_links: int = MAX_LINKS
    hedge_share: float = 0.05
    payload_checksum: bool = False

    def __post_init__(self) -> None:
        if self.capacity_rows < MAX_TOP_K:
            raise ConfigError(f"capacity_rows: {self.capacity_rows} is below {MAX_TOP_K}")
        if not 1 <= self.num_buffers <= 200:
            raise ConfigError(f"num_buffers: {self.num_buffers} is not within 1..200")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTerms:
    """What the gateway offers for a link and the worker accepts; both allocate by it.

    A message longer than the buffer that awaits it would abort the receiving process, so nothing
    is sent before both sides hold the same terms.
    """

    version: int
    transport: str
    hidden_size: int
    top_k: int
    dtype: str
    capacity_rows: int
    num_buffers: int
    link_timeout_s: float
    payload_checksum: bool = False

    @property
    def shape(self) -> MessageShape:
        """The shape of a row."""
        dtype = getattr(torch, self.dtype)
        return MessageShape(hidden_size=self.hidden_size, top_k=self.top_k, dtype=dtype)

    def to_json(self) -> str:
        """Return the terms as the store carries them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LinkTerms":
        """Read terms, but for what only a newer version has; raises DispatchError."""
        try:
            given = dict(json.loads(text))
            return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})
        except (TypeError, ValueError) as error:
            raise DispatchError(f"terms of a link are not understood: {text!r}") from error
