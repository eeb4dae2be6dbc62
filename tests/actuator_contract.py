"""What every actuator must do, whatever it acts upon: nodes come for members, and go with them."""

from collections.abc import Callable
from typing import Protocol

from cluster.control.ports import Actuator, NodeNeed
from workers.placement import Role


class World(Protocol):
    """Nodes that an actuator brings and takes away, and the members of one role that live there."""

    def nodes(self) -> frozenset[str]:
        """Return the ids of the nodes that are there for the role, with or without members."""
        ...

    def want(self, member: str) -> None:
        """Have a member's processes be started: they wait for a node."""
        ...

    def live(self, member: str) -> str:
        """Return the id of the node on which a wanted member lives now; it holds no other."""
        ...

    def leave(self, member: str) -> None:
        """Have a member leave; its node stays until it is taken away."""
        ...

    def advance(self) -> None:
        """Let the actuator and what it acts upon go on for a moment."""
        ...


def check_nodes_follow_members(
    actuator: Actuator,
    world: World,
    role: Role,
    *,
    count: int = 3,
    most_moments: int = 100,
    quiet_moments: int = 5,
) -> None:
    """Check that nodes come for members that are wanted, and that each goes with its member only.

    The world must begin without members, and with no more than `count` nodes for the role.
    `most_moments` bound each wait; what must not happen is watched for `quiet_moments`.
    """
    names = [f"member-{index}" for index in range(count)]
    for name in names:
        world.want(name)
    actuator.provide([NodeNeed(role=role, count=count, num_unplaced=count)])
    _advance_until(world, lambda: len(world.nodes()) == count, most_moments, "nodes for all")
    homes = {name: world.live(name) for name in names}
    assert len(set(homes.values())) == count, f"members share nodes: {homes}"
    _advance_quietly(actuator, world, _need(role, count, homes), quiet_moments)

    leaving = names[count // 2]
    _advance_quietly(actuator, world, _need(role, count - 1, homes), quiet_moments)
    assert actuator.trouble() == ""

    world.leave(leaving)
    vacated = homes.pop(leaving)
    actuator.provide([_need(role, count - 1, homes)])
    _advance_until(world, lambda: vacated not in world.nodes(), most_moments, "the node to go")
    _advance_quietly(actuator, world, _need(role, count - 1, homes), quiet_moments)

    world.want(leaving)
    actuator.provide([_need(role, count, homes, num_unplaced=1)])
    _advance_until(world, lambda: len(world.nodes()) == count, most_moments, "a node once more")
    homes[leaving] = world.live(leaving)
    _advance_quietly(actuator, world, _need(role, count, homes), quiet_moments)
    assert actuator.trouble() == ""


def _need(role: Role, count: int, homes: dict[str, str], num_unplaced: int = 0) -> NodeNeed:
    return NodeNeed(
        role=role, count=count, nodes=frozenset(homes.values()), num_unplaced=num_unplaced
    )


def _advance_until(
    world: World, is_so: Callable[[], bool], most_moments: int, awaited: str
) -> None:
    for _ in range(most_moments):
        if is_so():
            return
        world.advance()
    raise AssertionError(f"waited {most_moments} moments for {awaited}: {sorted(world.nodes())}")


def _advance_quietly(actuator: Actuator, world: World, need: NodeNeed, moments: int) -> None:
    """Ask for what is there, and check that no node comes or goes."""
    for _ in range(moments):
        actuator.provide([need])
        world.advance()
        assert world.nodes() == need.nodes
