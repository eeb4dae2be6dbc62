"""The choice of a gateway for a request: pure, over what gateways hold and keep."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from workers.placement import MemberId
from workers.types import PrefixPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLoad:
    """What the choice of a gateway looks at.

    `outstanding_tokens` are promised and not yet delivered; `cached_tokens` of the prompt in
    question need not be computed there.
    """

    id: MemberId
    outstanding_tokens: int
    cached_tokens: int = 0


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


def choose_gateway(
    loads: Iterable[GatewayLoad], excluding: Collection[MemberId] = ()
) -> MemberId | None:
    """Return the gateway with the fewest tokens ahead of a request's end; None if there is none.

    What is cached counts like tokens that are delivered already, so that a prefix which everybody
    shares draws requests to its gateway only until that one is busier by as much.
    """
    open_to_it = [load for load in loads if load.id not in excluding]
    if not open_to_it:
        return None
    return min(
        open_to_it, key=lambda load: (load.outstanding_tokens - load.cached_tokens, load.id)
    ).id
