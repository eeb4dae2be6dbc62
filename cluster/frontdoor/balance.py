"""The choice of a gateway for a request: pure, over what gateways hold and keep."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from cluster.ownership.directory import weight_of
from workers.placement import MemberId
from workers.types import GatewayStats, PrefixPlace

_FULL = 0.95  # of the KV blocks: who comes then may wait for one


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLoad:
    """What the choice of a gateway looks at.

    `outstanding_tokens` are promised and not yet delivered; `cached_tokens` of the request in
    question need not be computed there. `pace` says how many times slower than usual it steps, and
    `has_room` whether its memory takes the request at once.
    """

    id: MemberId
    outstanding_tokens: int
    cached_tokens: int = 0
    pace: float = 1.0
    has_room: bool = True


@dataclass(frozen=True, slots=True)
class KeptPrompt:
    """How many tokens of one prompt each gateway keeps, and what fetching them costs, in tokens.

    Of gateways that keep equally many, it is fetched from the one that comes first.
    """

    num_tokens: Mapping[MemberId, int]
    fetch_tokens: int = 0

    def spared(self, gateway: MemberId) -> int:
        """Return the tokens that need not be computed at a gateway, less what fetching costs."""
        place = self.elsewhere(gateway)
        own = self.num_tokens.get(gateway, 0)
        return own if place is None else place.num_tokens - self.fetch_tokens

    def elsewhere(self, gateway: MemberId) -> PrefixPlace | None:
        """Return where a gateway should fetch the prompt's begin; None if it should not."""
        if not self.fetch_tokens or not self.num_tokens:
            return None
        holder, longest = max(self.num_tokens.items(), key=lambda entry: entry[1])
        if longest - self.fetch_tokens <= self.num_tokens.get(gateway, 0):
            return None
        return PrefixPlace(longest, str(holder))


def has_room(stats: GatewayStats, num_sequences: int, num_new: int) -> bool:
    """Whether a gateway takes new sequences at once, beside those that it has by now.

    Each needs a state block; how many KV blocks it will need is not known, so that few are to be
    held.
    """
    has_states = num_sequences + num_new <= stats.state_blocks_total
    return has_states and stats.kv_blocks_used <= _FULL * stats.kv_blocks_total


def choose_gateway(
    loads: Iterable[GatewayLoad],
    excluding: Collection[MemberId] = (),
    *,
    num_tokens: int = 0,
    name: str = "",
) -> MemberId | None:
    """Return the gateway at which a request is likely to end first; None if there is none.

    Those whose memory is full are the last. What is cached counts like tokens that are delivered
    already, so that a prefix which everybody shares draws requests to its gateway only until that
    one is busier by as much. Of equal ones, front doors that know nothing of each other take
    different ones for different requests.

    Args:
        loads: Of all gateways that take work.
        excluding: Those that are out of the question.
        num_tokens: Of the request itself, prompt and expected completion.
        name: The request's id.
    """

    def rank(load: GatewayLoad) -> tuple[bool, float, bytes]:
        ahead = max(load.outstanding_tokens + num_tokens - load.cached_tokens, 0)
        return (not load.has_room, ahead * load.pace, weight_of(f"{name}/gateway", load.id))

    open_to_it = [load for load in loads if load.id not in excluding]
    return min(open_to_it, key=rank).id if open_to_it else None
