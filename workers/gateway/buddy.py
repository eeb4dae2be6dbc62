"""Which gateway keeps another one's snapshots: pure, over the View."""

import hashlib

from workers.gateway.snapshot import Holder
from workers.placement import Member, MemberId, MemberState, Role, View


def choose_buddy(view: View, owner: MemberId) -> Holder | None:
    """Return who keeps a gateway's snapshots; None where there is no other gateway.

    By rendezvous hash, so that a gateway that comes or goes changes few choices; on another node
    where there is one, since a node may be lost as a whole.
    """
    gateways = view.with_role(Role.GATEWAY)
    nodes = {m.node for m in gateways if m.id == owner}
    others = [m for m in gateways if m.id != owner and m.state is MemberState.ACTIVE and m.endpoint]
    if not others:
        return None
    elsewhere = [m for m in others if m.node not in nodes]
    chosen = max(elsewhere or others, key=lambda m: _weight(owner, m))
    return Holder(str(chosen.id), chosen.endpoint)


def _weight(owner: MemberId, other: Member) -> bytes:
    return hashlib.blake2b(f"{owner}/{other.id}".encode(), digest_size=8).digest()
