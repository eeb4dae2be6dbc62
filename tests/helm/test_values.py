"""What the chart refuses, and what it says then."""

import json

import pytest
import yaml

from tests.helm.harness_helm import CHART, HelmError, manifests, merged, named, pods, template
from tools import chart_schema

DOOR = {"listen": "0.0.0.0:50051", "health_listen": "0.0.0.0:50052"}
TLS = {"cert": "/etc/expertmesh/tls/tls.crt", "key": "/etc/expertmesh/tls/tls.key"}


def doors(**changes):
    return {"config": {"front_doors": {"insecure": True, **DOOR, **changes}}}


TYPOS = [
    ({"replicaCount": 2}, "replicaCount"),
    ({"image": {"tagg": "1"}}, "tagg"),
    ({"config": {"experts": {"worker": 3}}}, "worker"),
    ({"config": {"experts": {"workers": "three"}}}, "workers"),
    ({"config": {"control": {"silence_s": 0}}}, "silence_s"),
    ({"expertPools": {"default": {"maxReplica": 3}}}, "expertPools"),
    ({"expertPools": {"Not_A_Name": {}}}, "Not_A_Name"),
    ({"gatewayPools": {"default": {"gpu": {"number": 1}}}}, "gatewayPools"),
    ({"head": {"persistance": {}}}, "persistance"),
    ({"frontDoors": {"minReplicas": -1}}, "minReplicas"),
    ({"podDefaults": {"resources": {"limit": {}}}}, "limit"),
    ({"image": {"digest": "sha256:1"}}, "digest"),
    ({"ray": {"gcs": {"backend": "etcd"}}}, "backend"),
    ({"model": {"source": "s3"}}, "source"),
]


@pytest.mark.parametrize(("typo", "word"), TYPOS, ids=[word for _, word in TYPOS])
def test_the_schema_refuses_a_typo_and_names_it(typo, word):
    with pytest.raises(HelmError, match=word):
        template(values=merged(doors(), typo))


def test_helm_3_refuses_the_same_typos():
    wrong = doors()
    for typo, _ in TYPOS:
        wrong = merged(wrong, typo)

    with pytest.raises(HelmError) as refused:
        template("3", values=wrong)

    assert [word for _, word in TYPOS if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({}, "anybody could call the front doors"),
        (doors(listen="127.0.0.1:50051"), "nobody outside the pod reaches a loopback"),
        (doors(listen="0.0.0.0:0"), "a port that is known"),
        (doors(tls=TLS), "set tls.existingSecret"),
        ({**doors(tls=TLS, health_listen=""), "tls": {"existingSecret": "s"}}, "speak no TLS"),
        ({**doors(), "tls": {"existingSecret": "s"}}, "would speak cleartext"),
        (
            {**doors(tls={**TLS, "cert": "/x/tls.crt"}), "tls": {"existingSecret": "s"}},
            "does not lie in tls.mountPath",
        ),
        ({**doors(tls=TLS), "tls": {"certManager": {"enabled": True}}}, "name the issuer"),
        (doors(api_keys_file="/etc/expertmesh/keys/keys"), "set apiKeys.existingSecret"),
        ({**doors(), "apiKeys": {"existingSecret": "s"}}, "anybody could call"),
        (
            {**doors(api_keys_file="/keys"), "apiKeys": {"existingSecret": "s"}},
            "does not lie in apiKeys.mountPath",
        ),
        ({**doors(), "head": {"persistence": {"enabled": False}}}, "head.persistence.enabled"),
        ({**doors(), "ray": {"gcs": {"backend": "redis"}}}, "name the Redis"),
        (merged(doors(), {"config": {"control": {"resources": None}}}), "controller: 1"),
        (
            merged(doors(), {
                "podMonitor": {"enabled": True}, "config": {"telemetry": {"metrics_port": 0}},
            }),
            "podMonitor",
        ),
        ({**doors(), "model": {"source": "pvc"}}, "does not lie in model.mountPath"),
        (
            merged(doors(), {
                "model": {"source": "hostPath"}, "config": {"model": {"path": "/models/m"}},
            }),
            "model.hostPath.path",
        ),
        ({**doors(), "model": {"preload": {"enabled": True}}}, "set model.source: pvc"),
        (merged(doors(), {"expertPools": {"default": {"minReplicas": 5}}}), "above maxReplicas"),
        (merged(doors(), {"config": {"experts": {"workers": 5}}}), "expertPools have places for 4"),
        (merged(doors(), {"config": {"gateways": {"tensor_parallel": 4}}}), "wants 4 ranks"),
        (
            merged(doors(), {"config": {"autoscaler": {"experts": {"max": 9}}}}),
            "autoscaler.experts.max and standbys come to 9, and expertPools have places for 4",
        ),
        (
            merged(doors(), {"config": {"autoscaler": {"gateways": {"max": 9}}}}),
            "autoscaler.gateways.max comes to 9 ranks",
        ),
        (merged(doors(), {"config": {"gateways": {"standby": 9}}}), "wants 10 ranks"),
        (
            merged(doors(), {"config": {"autoscaler": {"actuator": "kuberay"}}}),
            "leave it at ray",
        ),
        (doors(count=2), "raise frontDoors.maxReplicas"),
        (merged(doors(), {"config": {"experts": {"resources": None}}}), "expert_slot: 1"),
        (
            merged(doors(), {"expertPools": {"default": {"rdma": {"count": 1}}}}),
            "name the resource of the device plugin",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused_with_what_to_do(values, advice):
    with pytest.raises(HelmError, match=advice):
        template(values=values)


def test_the_schema_is_that_of_today_s_values_and_configuration():
    committed = json.loads((CHART / "values.schema.json").read_text())

    assert committed == chart_schema.schema(), "run `make chart`"


def test_the_readme_s_table_is_that_of_today_s_values():
    assert (CHART / "README.md").read_text() == chart_schema.readme(), "run `make chart`"


def test_every_value_is_described():
    text = (CHART / "values.yaml").read_text()
    described = {path for path, _ in chart_schema.descriptions(text)}

    def leaves(tree, path=()):
        for key, value in tree.items():
            here = ".".join((*path, key))
            if here in described:
                continue
            if isinstance(value, dict) and value:
                yield from leaves(value, (*path, key))
            else:
                yield here

    free = {"ray.healthCheck"}  # described as a whole
    missing = [p for p in leaves(yaml.safe_load(text)) if not p.startswith(tuple(free))]
    assert missing == []


def test_large_numbers_reach_the_product_as_numbers():
    rendered = manifests(template(values=doors(max_message_bytes=2**24)))
    text = named(rendered, "ConfigMap", "-expertmesh")["data"]["config.yaml"]

    assert yaml.safe_load(text)["front_doors"]["max_message_bytes"] == 2**24


def test_a_pool_is_taken_away_by_null():
    values = merged(doors(), {"expertPools": {"default": None, "a100": {"maxReplicas": 8}}})
    cluster = named(manifests(template(values=values)), "RayCluster")

    groups = [group["groupName"] for group in cluster["spec"]["workerGroupSpecs"]]
    assert groups == ["expert-a100", "frontdoor", "gateway-default"]


def test_further_objects_are_rendered_with_their_templates():
    values = {
        **doors(),
        "extraObjects": [
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "{{ .Release.Name }}-x"}}
        ],
    }

    assert named(manifests(template(values=values)), "Secret")["metadata"]["name"] == "rel-x"


def test_one_registry_serves_every_image():
    values = {
        **doors(),
        "global": {"imageRegistry": "registry.example.internal", "imagePullSecrets": ["pull"]},
    }
    rendered = manifests(template(values=values))

    for _, pod in pods(rendered):
        assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]
        for container in pod["spec"]["containers"]:
            assert container["image"].startswith("registry.example.internal/expertmesh:")
