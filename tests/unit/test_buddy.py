"""Which gateway keeps another one's snapshots."""

from dataclasses import replace

from workers.gateway.buddy import choose_buddy
from workers.placement import Member, MemberId, MemberState, Placement, Role, View


def gateway(number: int, **changes: object) -> Member:
    member = Member(
        id=MemberId(f"gateway-{number}", 1),
        role=Role.GATEWAY,
        state=MemberState.ACTIVE,
        node=f"node-{number}",
        endpoint=f"host:{number}",
    )
    return replace(member, **changes)


def view(*members: Member) -> View:
    worker = Member(
        id=MemberId("expert-0", 1), role=Role.EXPERT_WORKER, state=MemberState.ACTIVE, endpoint="x"
    )
    return View(1, 1, (*members, worker), Placement("w", 1, 1))


def test_a_lone_gateway_has_nobody() -> None:
    me = gateway(0)
    leaving = gateway(1, state=MemberState.DRAINING)
    coming = gateway(2, state=MemberState.JOINING, endpoint="")

    assert choose_buddy(view(me), me.id) is None
    assert choose_buddy(view(me, leaving, coming), me.id) is None


def test_it_is_another_gateway_that_serves_on_another_node_where_there_is_one() -> None:
    members = [gateway(n, node=f"node-{n // 2}") for n in range(8)]
    for me in members:
        holder = choose_buddy(view(*members), me.id)
        chosen = next(m for m in members if str(m.id) == holder.member)
        assert chosen.node != me.node
        assert holder.endpoint == chosen.endpoint
    assert choose_buddy(view(*members[:2]), members[0].id).member == "gateway-1.1"


def test_the_choice_changes_with_the_chosen_one_only_and_is_spread() -> None:
    members = [gateway(n) for n in range(8)]
    chosen = {m.id: choose_buddy(view(*members), m.id).member for m in members}
    assert len(set(chosen.values())) > 2
    for gone in members:
        left = [m for m in members if m is not gone]
        for me in left:
            if chosen[me.id] != str(gone.id):
                assert choose_buddy(view(*left), me.id).member == chosen[me.id]
