"""What pods are allowed, how they are probed, and how they end."""

import json
import os
import signal
import subprocess
import sys

import pytest

from cluster.config import validate
from tests.helm.harness_helm import EXAMPLES, manifests, merged, named, pods, template

examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
SMOKE, MTLS, PRODUCTION = (
    next(path for path in EXAMPLES if path.stem == stem)
    for stem in ("cpu-smoke", "mtls", "production-397b")
)


def rendered(path, values=None):
    return manifests(template(files=[path], values=values))


def groups(found):
    cluster = named(found, "RayCluster")["spec"]
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def ray_container(group):
    return group["template"]["spec"]["containers"][0]


@examples
def test_every_container_is_as_restricted_as_pod_security_asks(example):
    for component, pod in pods(rendered(example)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, component
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]


@examples
def test_only_who_asks_for_rdma_may_lock_memory(example):
    for component, pod in pods(rendered(example)):
        adds = pod["spec"]["containers"][0]["securityContext"]["capabilities"].get("add", [])
        opted_in = example == PRODUCTION and component in {"gateway", "expert"}
        assert adds == (["IPC_LOCK"] if opted_in else [])


@examples
def test_no_pod_but_the_head_gets_a_token_of_kubernetes(example):
    for component, pod in pods(rendered(example)):
        assert component == "head" or pod["spec"]["automountServiceAccountToken"] is False


@examples
def test_what_is_written_lies_on_a_volume(example):
    for _, pod in pods(rendered(example)):
        for container in pod["spec"]["containers"]:
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            home = {e["name"]: e.get("value") for e in container["env"]}["HOME"]
            assert {"/tmp", home} <= mounts


@examples
def test_every_mount_has_its_volume(example):
    for _, pod in pods(rendered(example)):
        volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
        assert len(set(volumes)) == len(volumes)
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)


@examples
def test_a_node_is_alive_by_ray_s_word_whether_or_not_it_holds_a_member(example):
    found = rendered(example)
    for group in (named(found, "RayCluster")["spec"]["headGroupSpec"], *groups(found).values()):
        container = ray_container(group)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        asked = {"path": "/api/healthz", "port": "ray-health"}
        assert container["startupProbe"]["httpGet"] == asked
        assert container["livenessProbe"]["httpGet"] == asked
        params = group["rayStartParams"]
        assert str(ports["ray-health"]) == params["dashboard-agent-listen-port"]
        assert str(ports["metrics"]) == params["metrics-export-port"]


@examples
def test_a_front_door_is_ready_when_it_answers_on_its_cleartext_port(example):
    container = ray_container(groups(rendered(example))["frontdoor"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    assert container["readinessProbe"]["grpc"] == {
        "port": ports["grpc-health"],
        "service": "expertmesh.v1.ClusterService",
    }


def test_without_a_port_for_health_a_cleartext_front_door_is_asked_on_its_own():
    values = {"config": {"front_doors": {"health_listen": ""}}}
    container = ray_container(groups(rendered(SMOKE, values))["frontdoor"])

    assert container["readinessProbe"]["grpc"]["port"] == 50051


@examples
def test_kubernetes_waits_longer_than_ray_and_ray_as_long_as_the_role_drains(example):
    found = rendered(example)
    config = validate(named_config(found))
    drains = {"frontdoor": config.front_doors.drain_s, "gateway": config.gateways.drain_s}
    for name, group in groups(found).items():
        env = {e["name"]: e.get("value") for e in ray_container(group)["env"]}
        ray_s = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert ray_s >= drains.get(name.partition("-")[0], 0)
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == ray_s + 30


def named_config(found):
    import yaml

    return yaml.safe_load(named(found, "ConfigMap", "-expertmesh")["data"]["config.yaml"])


def test_the_container_s_command_becomes_ray_start_and_hears_the_signal(tmp_path):
    container = ray_container(groups(rendered(SMOKE))["expert-default"])
    stands_for_ray = tmp_path / "ray"
    stands_for_ray.write_text(
        f"#!{sys.executable}\n"
        "import json, os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print(json.dumps([os.getpid(), sys.argv[1:]]), flush=True)\n"
        "signal.pause()\n"
    )
    stands_for_ray.chmod(0o755)
    generated = (
        "ray start  --address=head:6379  --block "
        """ --labels=expertmesh/pool=expert-default --resources='{"expert_slot":1}' """
    )
    process = subprocess.Popen(
        [*container["command"], *container["args"]], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
        env={
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "KUBERAY_GEN_RAY_START_CMD": generated,
        },
    )  # fmt: skip
    try:
        pid, arguments = json.loads(process.stdout.readline())
        assert pid == process.pid, "a shell is in between"
        assert json.loads(arguments[-1].removeprefix("--resources=")) == {"expert_slot": 1}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 7
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def test_kuberay_leaves_the_command_as_it_is():
    cluster = named(rendered(SMOKE), "RayCluster")

    assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"


@examples
def test_each_role_s_nodes_offer_what_its_members_ask_for(example):
    found = rendered(example)
    config = validate(named_config(found))
    asked = {
        "frontdoor": config.front_doors, "gateway": config.gateways, "expert": config.experts,
    }  # fmt: skip
    for name, group in groups(found).items():
        section = asked[name.partition("-")[0]]
        for resource, amount in section.resources.items():
            members = int(float(group["resources"][resource]) // amount)
            assert members >= 1
            gpus = int(group["rayStartParams"]["num-gpus"])
            assert gpus >= members * section.num_gpus, f"{name}: {members} members on {gpus} GPUs"
    head = named(found, "RayCluster")["spec"]["headGroupSpec"]
    assert set(config.control.resources) <= set(head["resources"])


@examples
def test_groups_have_places_for_all_members(example):
    found = rendered(example)
    config = validate(named_config(found))
    ranks = config.gateways.count * config.gateways.tensor_parallel
    workers = config.experts.workers + config.experts.standby
    for resource, wanted in {
        "frontdoor": config.front_doors.count, "gateway": ranks, "expert_slot": workers,
    }.items():  # fmt: skip
        places = [
            float(group["resources"].get(resource, 0)) * group["maxReplicas"]
            for group in groups(found).values()
        ]
        assert sum(places) >= wanted


def test_gpus_and_rdma_devices_are_requests_and_limits_alike():
    resources = ray_container(groups(rendered(PRODUCTION))["gateway-h100"])["resources"]

    for kind in ("requests", "limits"):
        assert resources[kind]["nvidia.com/gpu"] == "4"
        assert resources[kind]["rdma/ib"] == "4"


def test_secrets_are_mounted_where_the_configuration_looks():
    found = rendered(PRODUCTION)
    config = validate(named_config(found))
    mounts = {m["name"]: m for m in ray_container(groups(found)["frontdoor"])["volumeMounts"]}

    assert config.front_doors.api_keys_file.startswith(mounts["api-keys"]["mountPath"] + "/")
    assert config.front_doors.tls.cert.startswith(mounts["tls"]["mountPath"] + "/")
    assert "subPath" not in {**mounts["tls"], **mounts["api-keys"]}, "would never be renewed"
    others = [g for name, g in groups(found).items() if name != "frontdoor"]
    assert not {"tls", "api-keys"} & {
        m["name"] for g in others for m in ray_container(g)["volumeMounts"]
    }


def test_the_journal_and_the_gcs_share_the_head_s_claim():
    found = rendered(SMOKE)
    spec = named(found, "RayCluster")["spec"]
    claim = named(found, "PersistentVolumeClaim", "-head")["metadata"]
    (volume,) = [
        v for v in spec["headGroupSpec"]["template"]["spec"]["volumes"] if v["name"] == "head"
    ]
    (mount,) = [
        m for m in ray_container(spec["headGroupSpec"])["volumeMounts"] if m["name"] == "head"
    ]

    assert volume["persistentVolumeClaim"]["claimName"] == claim["name"]
    assert mount["mountPath"] == validate(named_config(found)).control.journal
    assert spec["gcsFaultToleranceOptions"]["storage"] == {
        "claimName": claim["name"],
        "subPath": "gcs",
    }
    assert claim["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_changed_configuration_changes_the_applying_pod():
    def checksum(values):
        found = named(rendered(SMOKE, values), "Deployment", "-apply")
        return found["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    same, other = checksum({}), checksum({"config": {"dispatch": {"bit_stable": True}}})

    assert checksum({}) == same != other


def test_budgets_count_pods_since_a_ray_cluster_has_no_scale():
    found = rendered(PRODUCTION)
    budgets = {
        m["metadata"]["name"].removeprefix("rel-expertmesh-"): m["spec"]
        for m in found if m["kind"] == "PodDisruptionBudget"
    }  # fmt: skip

    assert set(budgets) == set(groups(found))
    for name, spec in budgets.items():
        assert spec["minAvailable"] == groups(found)[name]["minReplicas"] - 1
        assert spec["selector"]["matchLabels"]["ray.io/group"] == name


def policies(found):
    return {
        m["metadata"]["name"].removeprefix("rel-expertmesh-"): m["spec"]
        for m in found if m["kind"] == "NetworkPolicy"
    }  # fmt: skip


def test_ports_of_ray_and_links_are_reached_from_ray_s_pods_only():
    found = policies(rendered(SMOKE))
    inside = {"podSelector": {"matchLabels": {"ray.io/cluster": "rel-expertmesh"}}}

    assert found["ray"]["podSelector"]["matchLabels"] == inside["podSelector"]["matchLabels"]
    assert found["ray"]["ingress"] == [{"from": [inside]}]
    assert found["frontdoor"]["ingress"] == [{"ports": [{"port": 50051}]}]
    (to_head,) = found["head"]["ingress"]
    assert to_head["ports"] == [{"port": 10001}]
    assert (
        to_head["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "apply"
    )


def test_metrics_are_read_from_the_namespace_of_monitoring_only():
    found = policies(rendered(PRODUCTION))
    ports = [rule for rule in found["ray"]["ingress"] if "ports" in rule]

    assert [sorted(p["port"] for p in rule["ports"]) for rule in ports] == [[8080, 9400]]
    assert "namespaceSelector" in ports[0]["from"][0]


def test_the_test_pod_and_the_applying_pod_reach_what_they_call():
    found = rendered(MTLS)
    test = named(found, "Pod", "-test")
    apply = named(found, "Deployment", "-apply")["spec"]["template"]["spec"]["containers"][0]
    services = {m["metadata"]["name"]: m["spec"] for m in found if m["kind"] == "Service"}
    arguments = test["spec"]["containers"][0]["args"]

    (server,) = [a.partition("=")[2] for a in arguments if a.startswith("--server=")]
    host, _, port = server.partition(":")
    assert services[host]["ports"][0]["port"] == int(port)
    assert {"--tls-ca", "--tls-cert", "--tls-key"} <= {a.partition("=")[0] for a in arguments}
    env = {e["name"]: e for e in apply["env"]}
    assert env["RAY_HEAD"]["value"] == "ray://rel-expertmesh-head-svc:10001"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "expertmesh-ray-token"


def test_clients_find_front_doors_through_both_services():
    found = rendered(PRODUCTION)
    services = {m["metadata"]["name"]: m["spec"] for m in found if m["kind"] == "Service"}

    for spec in services.values():
        assert spec["selector"] == {"ray.io/cluster": "rel-expertmesh", "ray.io/group": "frontdoor"}
        assert spec["ports"][0]["appProtocol"] == "grpc"
    assert services["rel-expertmesh-headless"]["clusterIP"] == "None"
    route = named(found, "GRPCRoute")["spec"]["rules"][0]["backendRefs"][0]
    assert services[route["name"]]["ports"][0]["port"] == route["port"]


def test_the_certificate_names_both_services():
    certificate = named(rendered(PRODUCTION), "Certificate")["spec"]

    assert {
        "rel-expertmesh", "rel-expertmesh.prod.svc", "rel-expertmesh-headless", "llm.example.com",
    } <= set(certificate["dnsNames"])  # fmt: skip


def test_the_head_s_own_account_may_do_what_the_autoscaler_does_and_no_more():
    role = named(rendered(MTLS), "Role")

    assert [(r["resources"], r["verbs"]) for r in role["rules"]] == [
        (["pods"], ["get", "list", "watch", "patch"]),
        (["pods/resize"], ["patch"]),
        (["rayclusters"], ["get", "patch"]),
    ]
    assert [m for m in rendered(SMOKE) if m["kind"] in {"Role", "RoleBinding"}] == []


def test_the_preload_job_fetches_to_the_side_and_moves(tmp_path):
    job = named(rendered(PRODUCTION), "Job")["spec"]["template"]["spec"]["containers"][0]
    env = {e["name"]: e.get("value", "") for e in job["env"]}
    config = validate(named_config(rendered(PRODUCTION)))
    assert env["MODEL_DIR"] == config.model.path
    fetch = tmp_path / "hf"
    fetch.write_text(
        "#!/bin/sh\n"
        '[ "$1 $2 $3" = "download $MODEL_REPO --local-dir" ] || exit 9\n'
        'mkdir -p "$4"; echo "{}" >"$4/config.json"; [ -z "$FAIL" ]\n'
    )
    fetch.chmod(0o755)
    target = tmp_path / "model"

    def attempt(**more):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        env_now = {**env, "PATH": path, "MODEL_DIR": str(target), **more}
        return subprocess.run([*job["command"], *job["args"]], env=env_now, check=False).returncode

    assert attempt(FAIL="1") != 0
    assert not target.exists(), "half a checkpoint must not look like one"
    assert attempt() == 0
    assert (target / "config.json").exists()
    assert attempt(FAIL="1") == 0, "what is there is not fetched again"


def test_values_of_one_pool_stand_over_the_defaults_of_all():
    values = merged(
        {"podDefaults": {"shmSize": "3Gi", "nodeSelector": {"a": "1"}}},
        {"expertPools": {"default": {"nodeSelector": {"a": "2"}}}},
    )
    found = groups(rendered(SMOKE, values))

    assert found["expert-default"]["template"]["spec"]["nodeSelector"] == {"a": "2"}
    assert found["frontdoor"]["template"]["spec"]["nodeSelector"] == {"a": "1"}
