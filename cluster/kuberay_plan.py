"""What to change in a worker group of a RayCluster, so that it has the nodes that are needed: pure.

With in-tree autoscaling off, the operator counts the pods of a group that are not named in
`scaleStrategy.workersToDelete`. It creates what is missing to `replicas`, and where there are more
it deletes pods at random. So `replicas` is lowered only together with as many names.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.control.ports import NodeNeed
from workers.placement import Role

_UNLIMITED = 2**31 - 1  # the default of maxReplicas in the RayCluster's definition


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One worker group as it was read; `index` is where it stood in the list then.

    `strategy` is its `scaleStrategy`, None where there is none.
    """

    index: int
    name: str
    replicas: int
    min_replicas: int = 0
    max_replicas: int = _UNLIMITED
    num_hosts: int = 1
    strategy: Mapping[str, Any] | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The pods that the operator was told to delete, also those that are gone."""
        return tuple((self.strategy or {}).get("workersToDelete") or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One pod of the RayCluster; `group` is "" for the head's, `addresses` is empty while pending.

    `created_s` is when it was created, in seconds since any fixed point.
    """

    name: str
    group: str
    addresses: frozenset[str] = frozenset()
    created_s: float = 0.0
    terminating: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A group's new number of replicas and list of pods to delete; `victims` are new on it."""

    group: Group
    replicas: int
    named: tuple[str, ...]
    victims: tuple[str, ...]
    reason: str


def read_groups(cluster: Mapping[str, Any]) -> dict[str, Group]:
    """Return the worker groups of a RayCluster by name."""
    groups = (
        Group(
            index=index,
            name=spec["groupName"],
            replicas=spec.get("replicas", 0),
            min_replicas=spec.get("minReplicas", 0),
            max_replicas=spec.get("maxReplicas", _UNLIMITED),
            num_hosts=spec.get("numOfHosts", 1),
            strategy=spec.get("scaleStrategy"),
        )
        for index, spec in enumerate(cluster["spec"].get("workerGroupSpecs") or ())
    )
    return {group.name: group for group in groups}


def needs_of_groups(needs: Collection[NodeNeed], groups: Mapping[Role, str]) -> list[NodeNeed]:
    """Return the needs of roles that have a group, each with all nodes that must stay.

    A node of a group may hold a member of another role too. Processes of roles without a group may
    come to be on any node, so that all groups wait for them.
    """
    nodes = frozenset(node for need in needs for node in need.nodes)
    anywhere = sum(need.num_unplaced for need in needs if need.role not in groups)
    return [
        replace(need, nodes=nodes, num_unplaced=need.num_unplaced + anywhere)
        for need in needs
        if need.role in groups
    ]


def plan(
    group: Group, pods: Sequence[Pod], need: NodeNeed, addresses: Mapping[str, str]
) -> Change | None:
    """Return what brings a group to what is needed, or None when nothing can or should be changed.

    `pods` are all pods of the RayCluster, `addresses` gives the IP address of each Ray node that is
    alive. No pod is a victim that holds a member, or of which that cannot be told.
    """
    if group.num_hosts > 1:
        return None
    present = {pod.name for pod in pods if pod.group == group.name}
    staying = _staying(group, pods)
    still_there = tuple(name for name in group.named if name in present)
    target = _target(group, need)
    may_delete = not (still_there or need.num_unplaced or _unknown(pods, need, addresses))
    surplus = max(len(staying) - target, 0) if may_delete else 0
    victims = _victims(staying, need, addresses, surplus)
    # Fewer replicas than pods would make the operator choose: somebody else lowered them.
    replicas = max(group.replicas, len(staying), target) - len(victims)
    replicas = min(replicas, max(group.replicas, group.max_replicas))
    if replicas == group.replicas and not victims:
        return None
    return Change(
        group=group,
        replicas=replicas,
        named=still_there + victims,
        victims=victims,
        reason=f"{need.count} wanted of role {need.role.value}, {len(staying)} pods there",
    )


def obstacle(
    group: Group, pods: Sequence[Pod], need: NodeNeed, addresses: Mapping[str, str]
) -> str:
    """Say what keeps a group from becoming what is needed until somebody does something; or ""."""
    where = f"worker group {group.name}"
    if group.num_hosts > 1:
        return f"{where} has numOfHosts {group.num_hosts}: it must be 1, a pod a replica"
    if need.count > group.max_replicas:
        return (
            f"{where} has maxReplicas {group.max_replicas}, and {need.count} are wanted of role "
            f"{need.role.value}: raise maxReplicas, or want fewer"
        )
    unknown = _unknown(pods, need, addresses)
    if unknown and len(_staying(group, pods)) > _target(group, need):
        return (
            f"{where} keeps pods that are not needed: which pods Ray nodes {', '.join(unknown)} "
            f"run in is not known, and members are on these"
        )
    return ""


def operations(change: Change) -> list[dict[str, Any]]:
    """Return a change as a JSON patch, refused unless the group is there as it was read."""
    path = f"/spec/workerGroupSpecs/{change.group.index}"
    strategy = change.group.strategy
    patch = [
        _operation("test", f"{path}/groupName", change.group.name),
        _operation("test", f"{path}/replicas", change.group.replicas),
    ]
    if strategy is not None:
        patch.append(_operation("test", f"{path}/scaleStrategy", strategy))
    patch.append(_operation("replace", f"{path}/replicas", change.replicas))
    if change.named != change.group.named:
        value = {**(strategy or {}), "workersToDelete": list(change.named)}
        patch.append(_operation("add", f"{path}/scaleStrategy", value))  # replaces one, too
    return patch


def _operation(kind: str, path: str, value: object) -> dict[str, Any]:
    return {"op": kind, "path": path, "value": value}


def _target(group: Group, need: NodeNeed) -> int:
    return min(max(need.count, group.min_replicas), group.max_replicas)


def _staying(group: Group, pods: Sequence[Pod]) -> list[Pod]:
    """Return the pods of a group that nobody has begun to delete."""
    named = set(group.named)
    return [p for p in pods if p.group == group.name and not p.terminating and p.name not in named]


def _unknown(pods: Sequence[Pod], need: NodeNeed, addresses: Mapping[str, str]) -> list[str]:
    """Return the nodes that hold members and of which it is not known which pod they are.

    A pod's address may come to be known later than that of the Ray node in it.
    """
    known = {address for pod in pods for address in pod.addresses}
    return sorted(node for node in need.nodes if addresses.get(node) not in known)


def _victims(
    staying: Sequence[Pod], need: NodeNeed, addresses: Mapping[str, str], surplus: int
) -> tuple[str, ...]:
    """Return at most so many pods that hold no member: pending ones first, then the youngest."""
    held = {addresses[node] for node in need.nodes if node in addresses}
    free = [pod for pod in staying if pod.addresses.isdisjoint(held)]
    free.sort(key=lambda pod: (bool(pod.addresses), -pod.created_s, pod.name))
    return tuple(pod.name for pod in free[:surplus])
