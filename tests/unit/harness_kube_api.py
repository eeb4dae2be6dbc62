"""A Kubernetes API server and a KubeRay operator, small enough to run within a test.

kmock's emulator serves the objects over real HTTP. It is extended by what the guarded writing of a
RayCluster depends on: resource versions, JSON patches whose `test` may fail, a schema, label
selectors, and faults. All state is touched on the server's own thread, also by the test.
"""

import asyncio
import copy
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from random import Random
from typing import Any

import aiohttp.web
import attrs
import jsonpatch
import jsonpointer
from kmock import KubernetesEmulator, KubernetesError, Request, Server, action, resource
from kubernetes.client import ApiClient, Configuration

NAMESPACE = "models"
CLUSTER = "mesh"
RAYCLUSTERS = resource("ray.io", "v1", "rayclusters")
PODS = resource("", "v1", "pods")
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_PATIENCE_S = 30.0
_VERBS = {action.FETCH: "get", action.LIST: "list", action.UPDATE: "patch"}


@attrs.define(kw_only=True, slots=False)
class KubeApi(KubernetesEmulator):
    """The API server; its attributes switch faults on.

    `outage` has every request fail: with a status, or by "drop" (the connection breaks) or "hang".
    `refusals` are the statuses of the next patches. `forbidden` holds (verb, resource) pairs.
    `before_patch` is run once, when the next patch arrives. `lose_answers` applies patches and
    then fails.
    """

    outage: int | str = attrs.field(default="", init=False)
    refusals: list[int] = attrs.field(factory=list, init=False)
    forbidden: set[tuple[str, str]] = attrs.field(factory=set, init=False)
    before_patch: Callable[[], None] | None = attrs.field(default=None, init=False)
    lose_answers: bool = attrs.field(default=False, init=False)
    patches: list[list[dict]] = attrs.field(factory=list, init=False)  # that were applied
    num_refused: int = attrs.field(default=0, init=False)
    end: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    versions: Iterator[int] = attrs.field(factory=lambda: count(1), init=False)

    def put(self, kind: resource, body: dict) -> None:
        """Store an object under its next resource version."""
        body = copy.deepcopy(body)
        body["metadata"]["resourceVersion"] = str(next(self.versions))
        metadata = body["metadata"]
        self.objects[kind, metadata["namespace"], metadata["name"]] = body

    def named(self, kind: resource, name: str) -> dict:
        """Return a copy of an object."""
        return copy.deepcopy(self.objects[kind, NAMESPACE, name].raw)

    def all(self, kind: resource) -> list[dict]:
        """Return copies of all objects of a kind."""
        found = [item for (k, _, _), item in self.objects.items() if k == kind]
        return [copy.deepcopy(item.raw) for item in found if not item.deleted]

    async def _handle(self, request: Request) -> Any:
        await self._fail(request)
        if request.action != action.UPDATE:
            return await super()._handle(request)
        if self.before_patch is not None:
            hook, self.before_patch = self.before_patch, None
            hook()
            await self._fail(request)
        if self.refusals:
            self.num_refused += 1
            raise KubernetesError(status=self.refusals.pop(0), reason="Conflict", message="refused")
        self._update(request)
        if self.lose_answers:
            raise KubernetesError(status=504, reason="Timeout", message="nobody knows")
        # kmock would merge it once more.
        return aiohttp.web.json_response(self.named(request.resource, request.name))

    async def _fail(self, request: Request) -> None:
        if self.outage == "drop":
            request._raw_request.transport.close()
        if self.outage == "hang":
            await self.end.wait()
        if self.outage:
            status = self.outage if isinstance(self.outage, int) else 500
            raise KubernetesError(status=status, reason="Outage", message="an outage")
        if request.resource and (_VERBS[request.action], request.resource.plural) in self.forbidden:
            raise KubernetesError(status=403, reason="Forbidden", message="not allowed")

    async def _serve_list(self, request: Request) -> dict:
        found = await super()._serve_list(request)
        wanted = [pair.split("=") for pair in request.params.get("labelSelector", "").split(",")]
        for key, value in (pair for pair in wanted if len(pair) == 2):
            found["items"] = [
                item for item in found["items"] if item["metadata"]["labels"].get(key) == value
            ]
        return {"kind": "List", "apiVersion": "v1", **found}

    def _update(self, request: Request) -> None:
        """Apply a JSON patch, all of it or nothing."""
        before = self.named(request.resource, request.name)
        if request.headers.get("Content-Type") != "application/json-patch+json":
            raise KubernetesError(
                status=415, reason="UnsupportedMediaType", message="not a JSON patch"
            )
        try:
            after = jsonpatch.apply_patch(before, request.data)
            if after["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]:
                raise KubernetesError(status=409, reason="Conflict", message="modified meanwhile")
            if request.resource == RAYCLUSTERS:
                check_ray_cluster(after)
        except (
            ValueError,
            jsonpatch.JsonPatchException,
            jsonpointer.JsonPointerException,
        ) as error:
            self.num_refused += 1
            raise KubernetesError(status=422, reason="Invalid", message=str(error)) from error
        self.put(request.resource, after)
        self.patches.append(request.data)


def check_ray_cluster(body: dict) -> None:
    """Raise ValueError where a RayCluster is not what its definition allows."""
    groups = body["spec"]["workerGroupSpecs"]
    if len({group["groupName"] for group in groups}) < len(groups):
        raise ValueError("groupName is not unique")
    for group in groups:
        for key in ("replicas", "minReplicas", "maxReplicas"):
            if type(group.get(key, 0)) is not int or group.get(key, 0) < 0:
                raise ValueError(f"{key} must be an integer, at least 0: {group[key]!r}")
        names = group.get("scaleStrategy", {}).get("workersToDelete", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"workersToDelete must be a list of strings: {names!r}")


class KubeCluster:
    """A RayCluster, its operator and its pods, as a test drives them.

    A pod that is deleted is terminating until `finish_deletions`, unless `quick`. `rng` draws the
    victims of a number of replicas that was lowered without naming any.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.quick = True
        self.assign_addresses = True
        self.num_random_deletions = 0
        self._loop = loop
        self._rng = Random(0)
        self._births = count(1)
        self.api = self._do(KubeApi)
        self._await(self.api.__aenter__())
        self._server = Server(self.api)
        self._await(self._server.__aenter__())
        self._port = self._server.port

    def close(self) -> None:
        """Stop the server."""
        self._do(self.api.end.set)
        self._await(self._server.__aexit__(None, None, None))
        self._await(self.api.__aexit__(None, None, None))

    def client(self) -> ApiClient:
        """Return a client that does not try again by itself."""
        configuration = Configuration(host=f"http://127.0.0.1:{self._port}")
        configuration.retries = False
        configuration.proxy = None  # whatever the environment says
        return ApiClient(configuration)

    def create(self, groups: list[dict], **spec: Any) -> None:
        """Make the RayCluster, and the head's pod."""
        body = {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": CLUSTER, "namespace": NAMESPACE},
            "spec": {"workerGroupSpecs": groups, **spec},
        }
        self._do(lambda: self.api.put(RAYCLUSTERS, body))
        self._do(lambda: self._add_pod("headgroup", "head"))

    def edit(self, change: Callable[[dict], None]) -> None:
        """Have somebody else change the RayCluster."""
        self._do(lambda: self._edit(change))

    def edit_here(self, change: Callable[[dict], None]) -> None:
        """Do what `edit` does from the server's own thread, as `before_patch` runs there."""
        self._edit(change)

    def group(self, name: str) -> dict:
        """Return a worker group as it is specified."""
        body = self._do(lambda: self.api.named(RAYCLUSTERS, CLUSTER))
        return next(g for g in body["spec"]["workerGroupSpecs"] if g["groupName"] == name)

    def pods(self, group: str) -> dict[str, str]:
        """Return the address of each pod of a group by name; "" while it is pending."""
        return {
            pod["metadata"]["name"]: pod["status"].get("podIP", "")
            for pod in self._do(lambda: self._pods(group))
        }

    def operate(self) -> None:
        """Do one round of the operator."""
        self._do(self._operate)

    def finish_deletions(self) -> None:
        """Have the pods that are terminating go."""
        self._do(self._finish)

    def give_address(self, pod: str) -> None:
        """Have a pending pod run."""
        self._do(lambda: self._run(pod))

    def evict(self, pod: str) -> None:
        """Have somebody else delete a pod."""
        self._do(lambda: self._delete(pod))

    def stop_listening(self) -> None:
        """Have every connection refused."""
        self._await(self._server.__aexit__(None, None, None))

    def listen_again(self) -> None:
        """Undo `stop_listening`, at the same address."""
        self._server = Server(self.api, port=self._port)
        self._await(self._server.__aenter__())

    def _do(self, action: Callable[[], Any]) -> Any:
        async def act() -> Any:
            return action()

        return self._await(act())

    def _await(self, action: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(action, self._loop).result(_PATIENCE_S)

    def _edit(self, change: Callable[[dict], None]) -> None:
        body = self.api.named(RAYCLUSTERS, CLUSTER)
        change(body)
        self.api.put(RAYCLUSTERS, body)

    def _pods(self, group: str) -> list[dict]:
        found = self.api.all(PODS)
        return [pod for pod in found if pod["metadata"]["labels"]["ray.io/group"] == group]

    def _operate(self) -> None:
        for group in self.api.named(RAYCLUSTERS, CLUSTER)["spec"]["workerGroupSpecs"]:
            pods = [pod["metadata"]["name"] for pod in self._pods(group["groupName"])]
            named = group.get("scaleStrategy", {}).get("workersToDelete", [])
            for name in set(named) & set(pods):
                self._delete(name)
            counted = [name for name in pods if name not in named]
            bounds = group.get("minReplicas", 0), group.get("maxReplicas", 1000)
            wanted = min(max(group["replicas"], bounds[0]), bounds[1])
            for name in self._rng.sample(counted, max(len(counted) - wanted, 0)):
                self.num_random_deletions += 1
                self._delete(name)
            for _ in range(wanted - len(counted)):
                self._add_pod(group["groupName"], "worker")

    def _add_pod(self, group: str, kind: str) -> None:
        number = next(self._births)
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{CLUSTER}-{group}-{self._rng.randrange(16**5):05x}-{number}",
                "namespace": NAMESPACE,
                "creationTimestamp": (_EPOCH + timedelta(seconds=number)).isoformat(),
                "labels": {
                    "ray.io/cluster": CLUSTER,
                    "ray.io/group": group,
                    "ray.io/node-type": kind,
                },
            },
            "spec": {"containers": [{"name": "ray", "image": "expertmesh"}]},
            "status": {"phase": "Pending"},
        }
        self.api.put(PODS, body)
        if self.assign_addresses:
            self._run(body["metadata"]["name"])

    def _run(self, name: str) -> None:
        body = self.api.named(PODS, name)
        number = int(name.rpartition("-")[2])
        address = f"10.0.{number // 256}.{number % 256}"
        body["status"] = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
        self.api.put(PODS, body)

    def _delete(self, name: str) -> None:
        body = self.api.named(PODS, name)
        body["metadata"].setdefault("deletionTimestamp", _EPOCH.isoformat())
        self.api.put(PODS, body)
        if self.quick:
            self._finish()

    def _finish(self) -> None:
        for pod in self.api.all(PODS):
            if pod["metadata"].get("deletionTimestamp"):
                del self.api.objects[PODS, NAMESPACE, pod["metadata"]["name"]]


@contextmanager
def kube_cluster() -> Iterator[KubeCluster]:
    """Run an API server on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="kube-api", daemon=True)
    thread.start()
    cluster = KubeCluster(loop)
    try:
        yield cluster
    finally:
        cluster.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_PATIENCE_S)
        loop.close()
