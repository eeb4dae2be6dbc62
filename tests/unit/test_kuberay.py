"""Worker groups follow what is needed, and no pod goes that holds a member."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.app import actuator_of
from cluster.config import validate
from cluster.control.ports import NodeNeed
from cluster.kuberay import KubeRayPatch, in_cluster_client
from cluster.kuberay_plan import (
    Change,
    Group,
    Pod,
    needs_of_groups,
    obstacle,
    operations,
    plan,
    read_groups,
)
from tests.actuator_contract import check_nodes_follow_members
from tests.unit.harness_kube_api import CLUSTER, NAMESPACE, KubeCluster, kube_cluster
from workers.errors import ConfigError
from workers.placement import Role

EXPERTS, GATEWAYS = Role.EXPERT_WORKER, Role.GATEWAY


@pytest.fixture
def kube() -> Iterator[KubeCluster]:
    with kube_cluster() as cluster:
        yield cluster


def spec(name: str, replicas: int, **more: object) -> dict:
    return {"groupName": name, "replicas": replicas, "minReplicas": 0, "maxReplicas": 8, **more}


class Scene:
    """An actuator, the cluster that it acts upon, and the members of the experts' group."""

    def __init__(self, kube: KubeCluster, replicas: int = 0, **more: object) -> None:
        self.kube = kube
        self.hidden: set[str] = set()  # pods whose nodes' addresses are not known to Ray
        self.homes: dict[str, str] = {}  # pod of each member
        kube.create([spec("gateway", 1), spec("expert", replicas, **more)])
        kube.operate()
        self.actuator = self.make(background=False)

    def make(self, **more: object) -> KubeRayPatch:
        return KubeRayPatch(
            self.kube.client(),
            namespace=NAMESPACE,
            cluster=CLUSTER,
            groups={EXPERTS: "expert", GATEWAYS: "gateway"},
            addresses=self.addresses,
            timeout_s=more.pop("timeout_s", 20.0),
            **more,
        )

    def addresses(self) -> dict[str, str]:
        return {
            f"node-of-{pod}": address
            for pod, address in self.kube.pods("expert").items()
            if address and pod not in self.hidden
        }

    def hold(self, *pods: str) -> None:
        """Have members live in exactly these pods."""
        self.homes = {f"member-{pod}": pod for pod in pods}

    def need(self, count: int, num_unplaced: int = 0, extra: frozenset[str] = frozenset()) -> None:
        nodes = frozenset(f"node-of-{pod}" for pod in self.homes.values()) | extra
        self.actuator.provide(
            [NodeNeed(role=EXPERTS, count=count, nodes=nodes, num_unplaced=num_unplaced)]
        )

    def round(self, times: int = 1) -> str:
        """Have the actuator and then the operator do a round; returns the trouble."""
        for _ in range(times):
            self.actuator.reconcile()
            self.kube.operate()
        return self.actuator.trouble()

    def pods(self) -> list[str]:
        return list(self.kube.pods("expert"))

    def replicas(self) -> int:
        return self.kube.group("expert")["replicas"]

    def named(self) -> list[str]:
        return self.kube.group("expert").get("scaleStrategy", {}).get("workersToDelete", [])


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(3000):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise AssertionError("waited in vain")


def reverse_groups(body: dict) -> None:
    body["spec"]["workerGroupSpecs"].reverse()


# --- what is decided ---


def pod(name: str, address: str = "", **more: object) -> Pod:
    addresses = frozenset({address} if address else ())
    return Pod(name=name, group="g", addresses=addresses, **more)


def need_of(count: int, *nodes: str, num_unplaced: int = 0) -> NodeNeed:
    return NodeNeed(role=EXPERTS, count=count, nodes=frozenset(nodes), num_unplaced=num_unplaced)


ADDRESSES = {"a": "1", "b": "2", "c": "3"}  # of nodes
PODS = [pod("A", "1", created_s=1.0), pod("B", "2", created_s=2.0), pod("C", "3", created_s=3.0)]


def deleting(*names: str) -> dict[str, object]:
    return {"strategy": {"workersToDelete": list(names)}}


@pytest.mark.parametrize(
    ("group", "pods", "need", "expected"),
    [
        pytest.param({"replicas": 3}, PODS, need_of(3, "a", "b", "c"), None, id="enough"),
        pytest.param({"replicas": 3}, PODS, need_of(5, "a", num_unplaced=4), (5, ()), id="more"),
        pytest.param({"replicas": 3}, PODS, need_of(2, "a", "c"), (2, ("B",)), id="exactly-B"),
        pytest.param({"replicas": 3}, PODS, need_of(1, "a", "c"), (2, ("B",)), id="B-for-now"),
        pytest.param({"replicas": 3}, PODS, need_of(2, "a", "b", "c"), None, id="all-held"),
        pytest.param({"replicas": 3}, PODS, need_of(2), (2, ("C",)), id="youngest"),
        pytest.param(
            {"replicas": 4}, [pod("P"), *PODS], need_of(3), (3, ("P",)), id="pending-before-young"
        ),
        pytest.param({"replicas": 3}, PODS, need_of(2, num_unplaced=1), None, id="unplaced"),
        pytest.param({"replicas": 3}, PODS, need_of(2, "a", "x"), None, id="unknown-node"),
        pytest.param({"replicas": 3}, PODS[1:], need_of(1, "a"), None, id="pod-of-a-not-seen"),
        pytest.param({"replicas": 5}, PODS, need_of(3), None, id="pods-on-their-way-stay"),
        pytest.param({"replicas": 3, "min_replicas": 3}, PODS, need_of(1), None, id="min"),
        pytest.param({"replicas": 3, "max_replicas": 4}, PODS, need_of(9), (4, ()), id="max"),
        pytest.param({"replicas": 3, "num_hosts": 2}, PODS, need_of(9), None, id="multi-host"),
        pytest.param(
            {"replicas": 2, **deleting("C")}, PODS, need_of(1), None, id="deletion-is-under-way"
        ),
        pytest.param(
            {"replicas": 2, **deleting("C")}, PODS, need_of(3), (3, ("C",)), id="more-meanwhile"
        ),
        pytest.param(
            {"replicas": 3, **deleting("Z")}, PODS, need_of(2), (2, ("C",)), id="gone-is-dropped"
        ),
        pytest.param(
            {"replicas": 3, **deleting("Z")}, PODS, need_of(3), None, id="no-write-for-it"
        ),
        pytest.param(
            {"replicas": 3},
            [*PODS[:2], replace(PODS[2], terminating=True)],
            need_of(1, "a"),
            (2, ("B",)),
            id="terminating-is-gone-and-not-named",
        ),
        pytest.param(
            {"replicas": 1}, PODS, need_of(1, "a", "b", "c"), (3, ()), id="lowered-by-somebody"
        ),
    ],
)
def test_a_plan(group, pods, need, expected) -> None:
    change = plan(Group(index=0, name="g", **group), pods, need, ADDRESSES)

    assert (change and (change.replicas, change.named)) == expected


groups = st.builds(
    Group,
    index=st.just(0),
    name=st.just("g"),
    replicas=st.integers(0, 8),
    min_replicas=st.integers(0, 3),
    max_replicas=st.integers(3, 9),
    strategy=st.one_of(
        st.none(),
        st.lists(st.sampled_from("01234z"), unique=True).map(lambda w: {"workersToDelete": w}),
    ),
)
pods_of_group = st.integers(0, 6).flatmap(
    lambda n: st.tuples(
        *[
            st.builds(
                Pod,
                name=st.just(str(i)),
                group=st.sampled_from("gggh"),
                addresses=st.sampled_from([frozenset(), frozenset({f"ip{i}"})]),
                created_s=st.floats(0, 9),
                terminating=st.booleans(),
            )
            for i in range(n)
        ]
    )
)
node_needs = st.builds(
    NodeNeed,
    role=st.just(EXPERTS),
    count=st.integers(0, 9),
    nodes=st.frozensets(st.sampled_from([f"n{i}" for i in range(6)])),
    num_unplaced=st.sampled_from([0, 0, 0, 1]),
)
NODES = {f"n{i}": f"ip{i}" for i in range(5)}  # n5 is not known


def applied(change: Change) -> Group:
    strategy = {"workersToDelete": list(change.named)}
    return replace(change.group, replicas=change.replicas, strategy=strategy)


def num_counted(group: Group, pods) -> int:
    """Return how many pods the operator compares with the replicas."""
    return sum(p.group == "g" and p.name not in group.named for p in pods)


@given(groups, pods_of_group, node_needs)
def test_no_plan_takes_a_pod_that_holds_a_member_or_lets_the_operator_choose(
    group, pods, need
) -> None:
    change = plan(group, pods, need, NODES)
    if change is None:
        return
    by_name = {p.name: p for p in pods}
    held = {NODES.get(node) for node in need.nodes}
    for name in change.victims:
        assert by_name[name].group == "g"
        assert not by_name[name].addresses & held
        assert not by_name[name].terminating
        assert name not in group.named
    if change.victims:
        assert need.num_unplaced == 0
        assert need.nodes <= NODES.keys()
        assert not set(group.named) & {p.name for p in pods if p.group == "g"}
        assert change.replicas >= group.min_replicas
    assert group.replicas - change.replicas <= len(change.victims)
    assert change.replicas <= max(group.replicas, group.max_replicas)
    # Only what is needed stays away from the operator's random choice, as far as it was before.
    random_before = max(num_counted(group, pods) - group.replicas, 0)
    random_after = max(num_counted(applied(change), pods) - change.replicas, 0)
    assert random_after <= random_before
    assert plan(applied(change), pods, need, NODES) is None


@given(groups, pods_of_group, node_needs)
def test_rounds_end_with_what_is_needed(group, pods, need) -> None:
    """Pods that hold members stay throughout, with an operator that takes those first."""
    known = {address for p in pods if p.group == "g" for address in p.addresses}
    nodes = frozenset(node for node in need.nodes if NODES.get(node) in known)
    need = replace(need, nodes=nodes, num_unplaced=0)
    pods = tuple(replace(p, terminating=False) for p in pods if p.group == "g")
    # Begin as an operator has left it: what is named is gone, and the number is right.
    group = replace(group, max_replicas=9, replicas=max(len(pods), group.min_replicas))
    group = replace(group, strategy={"workersToDelete": ["z"]})
    births = iter(range(100, 200))
    for _ in range(12):
        change = plan(group, pods, need, NODES)
        group = applied(change) if change else group
        pods = tuple(p for p in pods if p.name not in group.named)
        assert len(pods) <= group.replicas, "the operator would choose"
        missing = group.replicas - len(pods)
        pods += tuple(Pod(name=str(next(births)), group="g") for _ in range(missing))

    held = {NODES[node] for node in nodes}
    assert held <= {address for p in pods for address in p.addresses}
    least = min(max(need.count, group.min_replicas), group.max_replicas)
    assert len(pods) == max(least, len(held)) == group.replicas


def test_a_pod_with_a_member_of_another_role_stays() -> None:
    needs = [need_of(1, "a"), NodeNeed(role=GATEWAYS, count=1, nodes=frozenset({"c"}))]
    (need,) = needs_of_groups(needs, {EXPERTS: "g"})

    change = plan(Group(index=0, name="g", replicas=3), PODS, need, ADDRESSES)

    assert change is not None
    assert change.victims == ("B",)


def test_unplaced_members_without_a_group_may_be_in_any_pod() -> None:
    needs = [need_of(1), NodeNeed(role=Role.FRONT_DOOR, count=1, num_unplaced=1)]

    assert needs_of_groups(needs, {EXPERTS: "g"}) == [need_of(1, num_unplaced=1)]
    assert needs_of_groups(needs, {EXPERTS: "g", Role.FRONT_DOOR: "h"})[0].num_unplaced == 0


def test_a_patch_tests_all_that_it_relies_on() -> None:
    cluster = {"spec": {"workerGroupSpecs": [spec("x", 1), spec("g", 3, scaleStrategy={})]}}
    group = read_groups(cluster)["g"]
    change = plan(group, PODS, need_of(2), ADDRESSES)
    assert change is not None

    path = "/spec/workerGroupSpecs/1"
    assert operations(change) == [
        {"op": "test", "path": f"{path}/groupName", "value": "g"},
        {"op": "test", "path": f"{path}/replicas", "value": 3},
        {"op": "test", "path": f"{path}/scaleStrategy", "value": {}},
        {"op": "replace", "path": f"{path}/replicas", "value": 2},
        {"op": "add", "path": f"{path}/scaleStrategy", "value": {"workersToDelete": ["C"]}},
    ]


def test_more_hosts_a_replica_are_refused() -> None:
    group = Group(index=0, name="g", replicas=1, num_hosts=4)

    assert "numOfHosts 4" in obstacle(group, PODS, need_of(1), ADDRESSES)


# --- against an API server and an operator ---


class KubeWorld:
    """The experts' worker group, to the contract of actuators."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def nodes(self) -> frozenset[str]:
        return frozenset(f"node-of-{name}" for name in self._scene.pods())

    def want(self, member: str) -> None:
        """Members find their nodes when these are there."""

    def live(self, member: str) -> str:
        free = [name for name in self._scene.pods() if name not in self._scene.homes.values()]
        self._scene.homes[member] = free[0]
        return f"node-of-{free[0]}"

    def leave(self, member: str) -> None:
        del self._scene.homes[member]

    def advance(self) -> None:
        self._scene.round()


def test_nodes_follow_members(kube) -> None:
    scene = Scene(kube)

    check_nodes_follow_members(scene.actuator, KubeWorld(scene), EXPERTS)

    assert kube.num_random_deletions == 0


def test_more_wanted_members_bring_pods(kube) -> None:
    scene = Scene(kube, 1)
    scene.need(4, num_unplaced=3)

    assert scene.round() == ""
    assert len(scene.pods()) == scene.replicas() == 4
    assert len(kube.pods("gateway")) == 1


def test_exactly_the_vacated_pod_goes(kube) -> None:
    scene = Scene(kube, 4)
    first, vacated, third, fourth = scene.pods()
    scene.hold(first, third, fourth)
    scene.need(3)

    scene.round(3)

    assert scene.pods() == [first, third, fourth]
    assert scene.named() == [vacated]
    assert len(kube.api.patches) == 1
    assert kube.num_random_deletions == 0


def test_a_conflict_is_tried_again_within_the_round(kube) -> None:
    scene = Scene(kube)
    kube.api.refusals = [409, 409]
    scene.need(2, num_unplaced=2)

    assert scene.round() == ""
    assert len(scene.pods()) == 2
    assert kube.api.num_refused == 2


def test_a_write_that_is_refused_again_and_again_is_told(kube) -> None:
    scene = Scene(kube)
    kube.api.refusals = [409] * 5
    scene.need(2, num_unplaced=2)

    assert "change of worker group expert was refused: 409" in scene.round()
    assert scene.replicas() == 0
    assert scene.round() == ""
    assert scene.replicas() == 2


def test_one_refused_group_does_not_hold_up_the_others(kube) -> None:
    scene = Scene(kube)
    kube.api.refusals = [409]
    scene.actuator.provide(
        [
            NodeNeed(role=EXPERTS, count=2, num_unplaced=2),
            NodeNeed(role=GATEWAYS, count=3, num_unplaced=2),
        ]
    )

    assert scene.round() == ""
    assert (scene.replicas(), kube.group("gateway")["replicas"]) == (2, 3)
    assert [p[0]["value"] for p in kube.api.patches] == ["gateway", "expert"]


@pytest.mark.parametrize("count", [0, 3])
def test_groups_that_change_places_are_never_taken_for_each_other(kube, count) -> None:
    scene = Scene(kube, 1)
    (gateway,) = kube.pods("gateway")
    kube.api.before_patch = lambda: kube.edit_here(reverse_groups)
    scene.need(count)

    assert scene.round() == ""
    assert kube.api.num_refused == 1
    assert kube.group("gateway") == spec("gateway", 1)
    assert list(kube.pods("gateway")) == [gateway]
    assert len(scene.pods()) == count


def test_a_number_that_somebody_wrote_meanwhile_is_read_first(kube) -> None:
    scene = Scene(kube, 2)

    def raise_to_four(body: dict) -> None:
        body["spec"]["workerGroupSpecs"][1]["replicas"] = 4

    kube.api.before_patch = lambda: kube.edit_here(raise_to_four)
    scene.need(1)
    scene.round(4)

    assert kube.api.num_refused == 1
    assert len(scene.pods()) == scene.replicas() == 1
    assert kube.num_random_deletions == 0


def test_a_missing_group_is_told_and_the_others_are_handled(kube) -> None:
    scene = Scene(kube)
    kube.edit(lambda body: body["spec"]["workerGroupSpecs"].pop(0))
    scene.actuator.provide(
        [
            NodeNeed(role=GATEWAYS, count=3, num_unplaced=3),
            NodeNeed(role=EXPERTS, count=2, num_unplaced=2),
            NodeNeed(role=Role.FRONT_DOOR, count=9),
        ]
    )

    trouble = scene.round()

    assert trouble == (
        "RayCluster mesh has no worker group gateway for role gateway: there are expert"
    )
    assert scene.replicas() == 2


@pytest.mark.parametrize("outage", [500, 503, 429, "drop", "hang", "refuse"])
def test_after_an_outage_exactly_the_right_pod_goes(kube, outage) -> None:
    scene = Scene(kube, 3)
    first, second, third = scene.pods()
    scene.actuator = scene.make(background=False, timeout_s=1.0)
    scene.hold(first, second)
    scene.need(2)
    if outage == "refuse":
        kube.stop_listening()
    else:
        kube.api.outage = outage

    for _ in range(2):
        scene.actuator.reconcile()
        assert "Kubernetes API cannot be used now" in scene.actuator.trouble()
    scene.hold(second, third)  # the members did not wait for it
    scene.need(2)
    if outage == "refuse":
        kube.listen_again()
    kube.api.outage = ""

    assert scene.round() == ""
    assert scene.pods() == [second, third]
    assert kube.num_random_deletions == 0


def test_an_outage_between_read_and_write_takes_no_wrong_pod(kube) -> None:
    scene = Scene(kube, 3)
    first, second, third = scene.pods()
    scene.hold(first, second)
    scene.need(2)

    def fail() -> None:
        kube.api.outage = 503

    kube.api.before_patch = fail
    assert "503" in scene.round()
    assert scene.pods() == [first, second, third]
    kube.api.outage = ""
    scene.hold(second, third)
    scene.need(2)

    assert scene.round() == ""
    assert scene.pods() == [second, third]


def test_a_write_whose_answer_is_lost_is_not_written_twice(kube) -> None:
    scene = Scene(kube, 3)
    first, second, third = scene.pods()
    scene.hold(first)
    scene.need(2)
    kube.api.lose_answers = True
    assert "504" in scene.round()
    kube.api.lose_answers = False

    assert scene.round(2) == ""
    assert scene.pods() == [first, second]
    assert scene.named() == [third]


def test_a_pending_deletion_blocks_the_next(kube) -> None:
    scene = Scene(kube, 3)
    kube.quick = False
    first, second, third = scene.pods()
    scene.hold(first, second)
    scene.need(2)
    scene.round()
    scene.hold(first)
    scene.need(1)

    scene.round(3)
    assert scene.named() == [third]
    assert scene.replicas() == 2
    kube.finish_deletions()
    scene.round()
    assert scene.named() == [second]
    kube.finish_deletions()
    assert scene.pods() == [first]
    assert kube.num_random_deletions == 0


def test_pods_may_come_while_one_is_going(kube) -> None:
    scene = Scene(kube, 2)
    kube.quick = False
    first, second = scene.pods()
    scene.hold(first)
    scene.need(1)
    scene.round()
    scene.need(3, num_unplaced=2)
    scene.round()

    assert scene.named() == [second]
    assert scene.replicas() == 3
    kube.finish_deletions()
    kube.operate()
    assert len(scene.pods()) == 3
    assert kube.num_random_deletions == 0


def test_a_member_that_is_not_placed_yet_blocks_deletions(kube) -> None:
    scene = Scene(kube, 2)
    first, second = scene.pods()
    scene.need(1, num_unplaced=1)
    scene.round(2)
    assert scene.pods() == [first, second]

    scene.hold(second)
    scene.need(1)
    scene.round()
    assert scene.pods() == [second]


def test_an_unknown_node_blocks_deletions_but_not_growth(kube) -> None:
    scene = Scene(kube, 3)
    first = scene.pods()[0]
    scene.hold(first)
    scene.hidden = {first}
    scene.need(1)

    assert f"Ray nodes node-of-{first}" in scene.round(2)
    assert len(scene.pods()) == 3
    scene.need(4)
    assert scene.round() == ""
    assert len(scene.pods()) == 4
    scene.hidden = set()
    scene.need(1)
    assert scene.round(3) == ""
    assert scene.pods() == [first]


def test_when_ray_is_away_pods_come_but_none_goes(kube) -> None:
    scene = Scene(kube, 2)
    scene.hold(scene.pods()[0])
    known = scene.addresses

    def fail() -> dict[str, str]:
        raise ConnectionError("no GCS")

    scene.addresses = fail
    scene.actuator = scene.make(background=False)
    scene.need(1)
    assert "no GCS" in scene.round()
    assert len(scene.pods()) == 2
    scene.need(3)
    assert "no GCS" in scene.round()
    assert len(scene.pods()) == 3
    scene.addresses = known
    scene.actuator = scene.make(background=False)
    scene.need(1)
    assert scene.round() == ""
    assert scene.pods() == list(scene.homes.values())


def test_names_of_pods_that_are_gone_are_dropped_with_the_next_write(kube) -> None:
    scene = Scene(kube, 3)
    first, second, third = scene.pods()
    scene.hold(first, second)
    scene.need(2)
    scene.round(3)
    assert scene.named() == [third]

    scene.need(3, num_unplaced=1)
    scene.round()
    assert scene.named() == []
    assert len(scene.pods()) == 3


def test_a_pending_pod_goes_first(kube) -> None:
    scene = Scene(kube, 2)
    running = scene.pods()
    kube.assign_addresses = False
    scene.need(4, num_unplaced=2)
    scene.round()
    scene.hold(running[0])
    scene.need(2)
    scene.round()

    assert scene.pods() == running


def test_the_bounds_of_a_group_hold(kube) -> None:
    scene = Scene(kube, 3, minReplicas=2, maxReplicas=4)
    scene.need(0)
    assert scene.round(3) == ""
    assert len(scene.pods()) == scene.replicas() == 2

    scene.need(9)
    trouble = scene.round(2)
    assert len(scene.pods()) == scene.replicas() == 4
    assert trouble == (
        "worker group expert has maxReplicas 4, and 9 are wanted of role expert_worker: "
        "raise maxReplicas, or want fewer"
    )
    scene.need(4)
    assert scene.round() == ""


def test_a_pod_that_somebody_deletes_is_replaced_and_not_named(kube) -> None:
    scene = Scene(kube, 3)
    kube.quick = False
    first, second, third = scene.pods()
    kube.evict(second)
    scene.hold(first)
    scene.need(1)
    scene.round(2)
    assert scene.named() == [third]
    kube.finish_deletions()
    kube.quick = True
    kube.operate()

    scene.round(2)
    assert scene.pods() == [first]
    assert kube.num_random_deletions == 0


def test_in_tree_autoscaling_is_refused(kube) -> None:
    scene = Scene(kube, 1)
    kube.edit(lambda body: body["spec"].update(enableInTreeAutoscaling=True))
    scene.need(3)

    assert "set the actuator to `ray`" in scene.round()
    assert scene.replicas() == 1
    kube.edit(lambda body: body["spec"].update(enableInTreeAutoscaling=False))
    assert scene.round() == ""
    assert scene.replicas() == 3


@pytest.mark.parametrize(
    "verb", [("get", "rayclusters"), ("patch", "rayclusters"), ("list", "pods")]
)
def test_what_is_forbidden_is_told(kube, verb) -> None:
    scene = Scene(kube, 1)
    kube.api.forbidden = {verb}
    scene.need(3)

    trouble = scene.round()
    assert "get and patch of rayclusters (ray.io) and list of pods" in trouble
    assert NAMESPACE in trouble
    kube.api.forbidden = set()
    assert scene.round() == ""


def test_a_raycluster_that_is_not_there_is_told(kube) -> None:
    scene = Scene(kube, 1)
    scene.actuator = KubeRayPatch(
        kube.client(),
        namespace=NAMESPACE,
        cluster="other",
        groups={EXPERTS: "expert"},
        addresses=dict,
        background=False,
    )
    scene.need(3)

    assert "there is no RayCluster other in namespace models" in scene.round()


def test_an_unforeseen_error_is_told_and_the_next_round_goes_on(kube) -> None:
    scene = Scene(kube, 1)
    kube.edit(lambda body: body["spec"]["workerGroupSpecs"].append({"replicas": 0}))
    scene.need(3)

    scene.actuator.reconcile()
    assert "KeyError('groupName')" in scene.actuator.trouble()
    kube.edit(lambda body: body["spec"]["workerGroupSpecs"].pop())
    assert scene.round() == ""
    assert scene.replicas() == 3


def test_needs_that_change_within_a_round_are_not_written_over(kube) -> None:
    scene = Scene(kube, 2)
    known = scene.addresses

    def hold_meanwhile() -> dict[str, str]:
        scene.hold(*scene.pods())
        scene.need(2)
        return known()

    scene.need(1)
    scene.addresses = hold_meanwhile
    scene.actuator = scene.make(background=False)
    scene.need(1)
    scene.round(2)

    assert len(scene.pods()) == 2
    assert kube.api.patches == []


def test_without_needs_nothing_is_asked_of_the_api(kube) -> None:
    scene = Scene(kube, 1)
    kube.api.outage = 500

    assert scene.round() == ""


def test_a_changed_need_wakes_the_thread_and_close_ends_it(kube) -> None:
    scene = Scene(kube, 0)
    before = set(threading.enumerate())
    scene.actuator = scene.make(period_s=3600.0)
    (thread,) = set(threading.enumerate()) - before
    written = threading.Event()
    kube.api.before_patch = written.set

    scene.need(2, num_unplaced=2)
    assert written.wait(30.0)
    scene.actuator.close()
    thread.join(30.0)
    assert not thread.is_alive()
    assert scene.replicas() == 2
    scene.need(0)
    assert scene.replicas() == 2


def test_the_thread_survives_an_outage(kube) -> None:
    scene = Scene(kube, 0)
    kube.api.outage = 503
    scene.actuator = scene.make(period_s=0.02)
    scene.need(2, num_unplaced=2)
    wait_until(lambda: "503" in scene.actuator.trouble())
    kube.api.outage = ""
    wait_until(lambda: scene.actuator.trouble() == "")
    scene.actuator.close()

    assert scene.replicas() == 2


def test_roles_that_share_a_group_are_refused(kube) -> None:
    with pytest.raises(ConfigError, match="share a worker group"):
        KubeRayPatch(
            kube.client(),
            namespace=NAMESPACE,
            cluster=CLUSTER,
            groups={EXPERTS: "g", GATEWAYS: "g"},
            addresses=dict,
        )


def test_outside_of_a_pod_there_is_no_client(monkeypatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    with pytest.raises(ConfigError, match="choose another actuator"):
        in_cluster_client()


def test_without_access_to_the_api_the_controller_runs_on_and_says_why() -> None:
    kuberay = {"actuator": "kuberay", "kuberay": {"cluster": "c"}}
    actuator = actuator_of(validate({"autoscaler": kuberay}))
    actuator.provide([])
    assert "no access to the Kubernetes API" in actuator.trouble()
