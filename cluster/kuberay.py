"""Nodes on Kubernetes by way of KubeRay, where its in-tree autoscaling is switched off.

The number of replicas of each worker group, and the names of the pods that may go, are patched into
the RayCluster; the operator does the rest. What to write is decided in `cluster/kuberay_plan.py`.
It needs the extra `kubernetes`.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from kubernetes.client import ApiClient, Configuration, CoreV1Api, CustomObjectsApi, V1Pod
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, load_incluster_config
from urllib3.exceptions import HTTPError

from cluster.control.ports import NodeNeed
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
from workers.errors import ConfigError
from workers.placement import Role

_log = structlog.get_logger("kuberay")

_READ_AGAIN = (409, 422)  # somebody else wrote since the read; a failed `test` is a 422
_TRIES = 5  # a round, before the next one is waited for


def in_cluster_client() -> ApiClient:
    """Return a client of the API server of the cluster that this process runs in.

    It never tries again by itself: the next round does. Raises ConfigError outside of a pod, or in
    one that has no service account.
    """
    configuration = Configuration()
    configuration.retries = False
    try:
        load_incluster_config(configuration)  # type: ignore[no-untyped-call]
    except (ConfigException, OSError) as error:
        raise ConfigError(
            f"no access to the Kubernetes API from here: {error} "
            f"Run this in a pod with a mounted service account, or choose another actuator"
        ) from error
    return ApiClient(configuration)


class KubeRayPatch:
    """Brings worker groups to what is needed, and removes exactly those pods that hold no member.

    `groups` names the worker group of each role, no group twice; roles without one (or with "") and
    other groups are left alone. `addresses` gives the IP address of each Ray node that is alive,
    and is called on the thread that this starts, which does a round every `period_s` and whenever
    the needs change. Without `background` there is no thread, and a test calls `reconcile`.
    Raises ConfigError when two roles share a group.
    """

    def __init__(
        self,
        client: ApiClient,
        *,
        namespace: str,
        cluster: str,
        groups: Mapping[Role, str],
        addresses: Callable[[], Mapping[str, str]],
        period_s: float = 5.0,
        timeout_s: float = 10.0,
        background: bool = True,
    ) -> None:
        named = {role: group for role, group in groups.items() if group}
        if len(set(named.values())) < len(named):
            raise ConfigError(f"roles share a worker group, each needs its own: {named}")
        self._api = _RayClusterApi(client, namespace, cluster, timeout_s)
        self._groups = named
        self._addresses = addresses
        self._period_s = period_s
        self._needs: tuple[NodeNeed, ...] = ()
        self._trouble = ""
        self._wake = threading.Event()
        self._closed = threading.Event()
        if background:
            threading.Thread(target=self._run, name="kuberay", daemon=True).start()

    def provide(self, needs: Sequence[NodeNeed]) -> None:
        """See `Actuator.provide`."""
        if tuple(needs) != self._needs:
            self._needs = tuple(needs)
            self._wake.set()

    def trouble(self) -> str:
        """See `Actuator.trouble`."""
        return self._trouble

    def close(self) -> None:
        """See `Actuator.close`; a request on its way is still carried out."""
        self._closed.set()
        self._wake.set()

    def reconcile(self) -> None:
        """Do one round: read, decide, write; what was in the way is told by `trouble`."""
        needs = self._needs
        try:
            trouble = "; ".join(self._round(needs)) if needs else ""
        except (ApiException, HTTPError) as error:
            trouble = self._api.explain(error)
        except Exception as error:  # noqa: BLE001 - the next round may well succeed
            _log.exception("a round failed")
            trouble = f"the actuator failed, its log tells where: {error!r}"
        if trouble and trouble != self._trouble:
            _log.warning("nodes do not come or go as they should", trouble=trouble)
        elif self._trouble and not trouble:
            _log.info("nodes come and go again")
        self._trouble = trouble

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._period_s)
            self._wake.clear()
            if not self._closed.is_set():
                self.reconcile()

    def _round(self, needs: tuple[NodeNeed, ...]) -> list[str]:
        """Work towards these needs; returns the troubles."""
        troubles, refusals = self._attempt(needs)
        for _ in range(_TRIES - 1):
            if not refusals:
                break
            troubles, refusals = self._attempt(needs)
        return troubles + refusals

    def _attempt(self, needs: tuple[NodeNeed, ...]) -> tuple[list[str], list[str]]:
        """Read once and write each group at most once; returns troubles, and refused writes."""
        addresses, troubles = self._read_addresses()
        cluster = self._api.read()
        if cluster["spec"].get("enableInTreeAutoscaling"):
            return [
                f"RayCluster {self._api.name} has enableInTreeAutoscaling, and two writers of "
                f"replicas would fight: set the actuator to `ray`"
            ], []
        pods = self._api.read_pods()
        specs = read_groups(cluster)
        refusals = []
        for need in needs_of_groups(needs, self._groups):
            group = specs.get(self._groups[need.role])
            if group is None:
                troubles.append(self._missing(need.role, specs))
                continue
            if reason := obstacle(group, pods, need, addresses):
                troubles.append(reason)
            change = plan(group, pods, need, addresses)
            if change is not None and not self._outdated(needs):
                refusals += self._write(change)
        return troubles, refusals

    def _read_addresses(self) -> tuple[Mapping[str, str], list[str]]:
        """Return the addresses, none when they cannot be had: nodes may come, but none goes."""
        try:
            return self._addresses(), []
        except Exception as error:  # noqa: BLE001 - Ray may be away; whatever it is, it is told
            return {}, [f"the addresses of Ray's nodes cannot be had: {error!r}"]

    def _outdated(self, needs: tuple[NodeNeed, ...]) -> bool:
        """Whether to leave the writing to the next round, since a victim may have a member now."""
        return self._closed.is_set() or self._needs != needs

    def _write(self, change: Change) -> list[str]:
        """Write one change; returns how it was refused, if it was."""
        group = change.group
        log = _log.bind(
            group=group.name,
            replicas=change.replicas,
            before=group.replicas,
            victims=change.victims,
            reason=change.reason,
        )
        try:
            self._api.patch(operations(change))
        except (ApiException, HTTPError) as error:
            if isinstance(error, ApiException) and error.status in _READ_AGAIN:
                return [f"the change of worker group {group.name} was refused: {_message(error)}"]
            log.warning("a worker group may have been changed, or not", error=repr(error))
            raise
        log.info("worker group changed")
        return []

    def _missing(self, role: Role, specs: Mapping[str, Group]) -> str:
        return (
            f"RayCluster {self._api.name} has no worker group {self._groups[role]} for role "
            f"{role.value}: there are {', '.join(sorted(specs)) or 'none'}"
        )


class _RayClusterApi:
    """One RayCluster and its pods, by requests that have a deadline."""

    def __init__(self, client: ApiClient, namespace: str, name: str, timeout_s: float) -> None:
        self.name = name
        self._namespace = namespace
        self._timeouts_s = (timeout_s, timeout_s)  # to connect, and to read
        self._custom = CustomObjectsApi(client)
        self._core = CoreV1Api(client)
        self._place: dict[str, Any] = {
            "group": "ray.io",
            "version": "v1",
            "namespace": namespace,
            "plural": "rayclusters",
            "name": name,
        }

    def read(self) -> dict[str, Any]:
        """Return the RayCluster."""
        found: Any = self._custom.get_namespaced_custom_object(
            **self._place, _request_timeout=self._timeouts_s
        )
        return dict(found)

    def read_pods(self) -> list[Pod]:
        """Return all its pods, the head's too."""
        found = self._core.list_namespaced_pod(
            self._namespace,
            label_selector=f"ray.io/cluster={self.name}",
            _request_timeout=self._timeouts_s,
        )
        return [_pod(item) for item in found.items]

    def patch(self, patch: list[dict[str, Any]]) -> None:
        """Apply a JSON patch, all of it or nothing."""
        self._custom.patch_namespaced_custom_object(
            **self._place,
            body=patch,
            _content_type="application/json-patch+json",  # the client would say a merge patch
            _request_timeout=self._timeouts_s,
        )

    def explain(self, error: ApiException | HTTPError) -> str:
        """Say what went wrong with a request, and what to do."""
        status = error.status if isinstance(error, ApiException) else None
        if status == 403:
            return (
                f"the Kubernetes API forbids it: allow the service account get and patch of "
                f"rayclusters (ray.io) and list of pods in namespace {self._namespace}"
            )
        if status == 401:
            return "the Kubernetes API does not accept the service account's token"
        if status == 404:
            return (
                f"there is no RayCluster {self.name} in namespace {self._namespace}: "
                f"check both names, and that KubeRay is installed"
            )
        what = _message(error) if isinstance(error, ApiException) else str(error)
        return f"the Kubernetes API cannot be used now: {what}; it is tried again"


def _pod(item: V1Pod) -> Pod:
    metadata, status = item.metadata, item.status
    assert metadata is not None, "the API server gives every pod metadata"
    labels = metadata.labels or {}
    created = metadata.creation_timestamp
    return Pod(
        name=metadata.name or "",
        group=labels.get("ray.io/group", "") if _is_worker(labels) else "",
        addresses=frozenset({status.pod_ip} if status and status.pod_ip else ()),
        created_s=created.timestamp() if created else 0.0,
        terminating=metadata.deletion_timestamp is not None,
    )


def _is_worker(labels: Mapping[str, str]) -> bool:
    return labels.get("ray.io/node-type") == "worker"


def _message(error: ApiException) -> str:
    """Return what the API server says of an error, in one line."""
    try:
        return f"{error.status} {json.loads(error.body or '')['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.status} {error.reason}"
