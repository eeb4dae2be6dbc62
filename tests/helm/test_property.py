"""Any values that fit together render to what Kubernetes and KubeRay take."""

import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import validate
from tests.helm.harness_helm import manifests, merged, named, pods, template
from tests.helm.harness_schema import CRDS, check_built_in, check_ray_cluster, is_built_in

PLAIN = {
    "config": {
        "front_doors": {
            "insecure": True, "listen": "0.0.0.0:50051", "health_listen": "0.0.0.0:50052",
        },
    },
}  # fmt: skip


def maybe(**values):
    """Draw some of these keys, each with a value of its strategy."""
    return st.fixed_dictionaries({}, optional=values)


texts = st.dictionaries(st.sampled_from(["team", "example.com/cost"]), st.just("x"), max_size=2)
quantities = maybe(
    requests=st.just({"cpu": "1", "memory": "1Gi"}), limits=st.just({"memory": 2**31})
)
pod = maybe(
    minReplicas=st.integers(0, 3), drainSeconds=st.integers(0, 7200),
    idleTimeoutSeconds=st.integers(0, 900), priority=st.integers(-5, 5), resources=quantities,
    gpu=maybe(count=st.integers(0, 8), resource=st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"])),
    rdma=st.just({"count": 2, "resource": "rdma/ib"}),
    ipcLock=st.booleans(), shmSize=st.sampled_from(["64Mi", 2**28]), rayLabels=texts,
    podLabels=texts, podAnnotations=texts, nodeSelector=texts,
    tolerations=st.just([{"operator": "Exists"}]), priorityClassName=st.just("high"),
    schedulerName=st.just("volcano"), runtimeClassName=st.just("nvidia"),
    topologySpreadConstraints=st.just([{
        "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
    }]),
    resourceClaims=st.just([{"name": "gpu", "resourceClaimTemplateName": "gpu"}]),
    pdb=maybe(enabled=st.booleans(), minAvailable=st.none() | st.integers(0, 3)),
    extraEnv=st.just([{"name": "A", "value": "1"}]),
    extraEnvFrom=st.just([{"secretRef": {"name": "s"}}]),
    extraVolumes=st.just([{"name": "extra", "emptyDir": {}}]),
    initContainers=st.just([{"name": "first", "image": "x"}]),
    extraContainers=st.just([{"name": "beside", "image": "x"}]),
)  # fmt: skip
secret = st.sampled_from(["", "some-secret"])
doors = st.sampled_from(
    [
        {},
        {
            "apiKeys": {"existingSecret": "keys"},
            "test": {"apiKeySecret": "key"},
            "config": {"front_doors": {"api_keys_file": "/etc/expertmesh/keys/keys"}},
        },
        {
            "tls": {"existingSecret": "tls"},
            "test": {"clientTlsSecret": "client"},
            "config": {
                "front_doors": {
                    "tls": {
                        "cert": "/etc/expertmesh/tls/tls.crt",
                        "key": "/etc/expertmesh/tls/tls.key",
                        "client_ca": "/etc/expertmesh/tls/ca.crt",
                    }
                }
            },
        },
        {
            "tls": {"certManager": {"enabled": True, "issuerRef": {"name": "ca"}}},
            "config": {
                "front_doors": {
                    "tls": {
                        "cert": "/etc/expertmesh/tls/tls.crt",
                        "key": "/etc/expertmesh/tls/tls.key",
                    }
                }
            },
        },
    ]
)
preloads = st.sampled_from(
    [
        {},
        {"preload": {"enabled": True, "repo": "a/b", "directory": "m"}},
        {
            "preload": {
                "enabled": True,
                "from": "s3",
                "uri": "s3://a",
                "image": "i",
                "directory": "m",
            }
        },
    ]
)
claims = maybe(existingClaim=secret, subPath=st.just("m"), keep=st.booleans())
models = (
    st.just({})
    | st.just({"model": {"source": "hostPath", "hostPath": {"path": "/mnt/models"}}})
    | st.builds(
        lambda pvc, more: {"model": {"source": "pvc", "pvc": pvc, **more}}, claims, preloads
    )
).map(lambda model: {**model, "config": {"model": {"path": "/models/m"}}})
storage = st.sampled_from(
    [
        {
            "ray": {"gcs": {"backend": "rocksdb"}},
            "head": {"persistence": {"existingClaim": "mine"}},
        },
        {"ray": {"gcs": {"backend": "redis", "redis": {"address": "redis:6379"}}}},
        {"ray": {"gcs": {"backend": "none"}}, "head": {"persistence": {"enabled": False}}},
    ]
)
pool = st.builds(
    lambda values, most: {**values, "maxReplicas": values.get("minReplicas", 1) + most},
    pod,
    st.integers(4, 9),
)
others = maybe(
    commonLabels=texts,
    commonAnnotations=texts,
    fullnameOverride=st.sampled_from(["", "x", "y" * 40]),
    image=maybe(registry=st.just("r.example"), tag=st.just("1"), pullPolicy=st.just("Always")),
    imagePullSecrets=st.just(["pull"]),
    podDefaults=pod.map(lambda values: {**values, "minReplicas": 0}),
    frontDoors=pool,
    gatewayPools=st.dictionaries(st.sampled_from(["default", "a100"]), pool, min_size=1),
    expertPools=st.dictionaries(st.sampled_from(["default", "h200"]), pool, min_size=1),
    config=maybe(
        front_doors=maybe(drain_s=st.floats(1, 900)),
        gateways=maybe(drain_s=st.integers(1, 7200)),
        experts=maybe(workers=st.integers(0, 3), standby=st.integers(0, 1)),
    ),
    ray=maybe(auth=maybe(mode=st.sampled_from(["token", "disabled"]), existingSecret=secret)),
    head=maybe(
        serviceAccount=maybe(create=st.booleans(), name=st.sampled_from(["", "mine"])),
    ),
    serviceAccount=maybe(create=st.booleans(), name=st.sampled_from(["", "mine"])),
    apply=maybe(enabled=st.booleans(), tolerations=st.just([{"operator": "Exists"}])),
    service=maybe(type=st.sampled_from(["ClusterIP", "LoadBalancer"]), port=st.just(443)),
    ingress=maybe(enabled=st.booleans(), host=st.just("h.example"), tlsSecret=secret).map(
        lambda values: {"host": "h.example", **values}
    ),
    grpcRoute=maybe(enabled=st.booleans()).map(
        lambda values: {"parentRefs": [{"name": "g"}], **values}
    ),
    networkPolicy=maybe(
        enabled=st.booleans(),
        clients=st.just([{"podSelector": {}}]),
        monitoring=st.just([]),
    ),
    podMonitor=maybe(enabled=st.booleans(), ray=st.booleans()),
    prometheusRule=maybe(enabled=st.booleans()),
    dashboards=maybe(enabled=st.booleans()),
)
values = st.tuples(others, doors, models, storage).map(
    lambda parts: functools.reduce(merged, parts, PLAIN)
)  # fmt: skip


def check(drawn):
    found = manifests(template(values=drawn))
    for manifest in found:
        if is_built_in(manifest):
            check_built_in(manifest, "1.37")
    if CRDS.exists():
        check_ray_cluster(named(found, "RayCluster"))
    for component, pod_ in pods(found):
        names = [volume["name"] for volume in pod_["spec"]["volumes"]]
        assert len(set(names)) == len(names), component
        mounts = [m["mountPath"] for m in pod_["spec"]["containers"][0]["volumeMounts"]]
        assert len(set(mounts)) == len(mounts), component


few = settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@few
@given(values)
def test_values_that_fit_together_render_to_what_kubernetes_takes(drawn):
    check(drawn)


@pytest.mark.full
@pytest.mark.timeout(1800)
@settings(few, max_examples=150, derandomize=False)
@given(values)
def test_many_values_that_fit_together_render_to_what_kubernetes_takes(drawn):
    check(drawn)


def test_the_plain_values_render():
    found = manifests(template(values=PLAIN))

    assert validate(PLAIN["config"])
    assert named(found, "RayCluster")
