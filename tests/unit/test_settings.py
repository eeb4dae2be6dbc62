"""What of a changed configuration is taken on at once, by a rollout, or never."""

import pickle

import pytest

from cluster.config import ClusterConfig, load_config
from cluster.control.settings import COUNTS, Differences, differences, digests
from workers.placement import Role

BEFORE = load_config()


def changed(*settings: str) -> ClusterConfig:
    return load_config(None, settings)


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("gateways.count=3", "counts"),
        ("experts.workers=3", "counts"),
        ("front_doors.count=3", "counts"),
        ("experts.workers=0", "never"),
        ("model.path=elsewhere", "never"),
        ("model.dtype=bfloat16", "never"),
        ("dispatch.bit_stable=true", "never"),
        ("dispatch.capacity_rows=64", "never"),
        ("control.journal=elsewhere", "never"),
        ("experts.floor=1", "at_once"),
        ("experts.standby=1", "at_once"),
        ("experts.min=1", "at_once"),
        ("control.lost_s=30", "at_once"),
        ("gateways.cell_ranks=64", "at_once"),
        ("experts.threads=2", "by_rollout"),
        ("experts.slots=400", "by_rollout"),
        ("experts.resources={expert_slot: 1}", "by_rollout"),
        ("gateways.max_sequences=7", "by_rollout"),
        ("front_doors.api_keys_file=keys", "by_rollout"),
        ("front_doors.operators=[ops]", "by_rollout"),
        ("telemetry.log_level=debug", "by_rollout"),
        ("model.name=other", "by_rollout"),
    ],
)
def test_every_change_is_of_one_kind(setting, kind):
    found = differences(BEFORE, changed(setting))

    for name in Differences.__dataclass_fields__:
        assert bool(getattr(found, name)) == (name == kind)
    (text,) = getattr(found, kind)
    assert text.startswith(setting.partition("=")[0])
    assert " -> " in text


def test_a_section_of_settings_is_compared_by_its_keys():
    found = differences(BEFORE, changed("front_doors.tls={cert: a, key: b, client_ca: c}"))

    assert [text.partition(":")[0] for text in found.by_rollout] == [
        "front_doors.tls.cert", "front_doors.tls.client_ca", "front_doors.tls.key",
    ]  # fmt: skip


@pytest.mark.parametrize("role", ["gateways", "experts"])
def test_gpus_that_would_change_the_dtype_of_one_role_alone_are_refused(role):
    found = differences(BEFORE, changed(f"{role}.num_gpus=1"))

    (text,) = found.never
    assert text.endswith("float32 -> bfloat16")
    assert (
        differences(
            changed("model.dtype=float32"), changed("model.dtype=float32", f"{role}.num_gpus=1")
        ).never
        == ()
    )


def test_what_an_older_program_has_pickled_has_the_keys_that_it_did_not_know():
    older = load_config(None, ["control.lost_s=30"])
    del older.control.__dict__["cells"]

    read = pickle.loads(pickle.dumps(older))

    assert (read.control.cells, read.control.lost_s) == (1, 30)
    assert differences(read, changed("control.lost_s=30")) == Differences()


def test_nothing_differs_from_itself():
    assert differences(BEFORE, load_config()) == Differences()


@pytest.mark.parametrize(
    ("setting", "roles"),
    [
        ("gateways.max_sequences=7", {Role.GATEWAY}),
        ("experts.threads=2", {Role.EXPERT_WORKER}),
        ("front_doors.max_requests=7", {Role.FRONT_DOOR}),
        ("gateways.context_tokens=99", {Role.GATEWAY, Role.FRONT_DOOR}),
        ("dispatch.first_deadline_s=9", {Role.GATEWAY, Role.EXPERT_WORKER}),
        ("telemetry.log_level=debug", {Role.GATEWAY, Role.EXPERT_WORKER, Role.FRONT_DOOR}),
        ("control.pulse_s=1", set()),
        ("experts.standby=2", set()),
        *((f"{key}=9", set()) for key in COUNTS),
    ],
)
def test_a_digest_changes_for_the_roles_that_read_the_setting(setting, roles):
    before, after = digests(BEFORE, "build"), digests(changed(setting), "build")

    assert {role for role in before if before[role] != after[role]} == roles


def test_another_build_changes_every_digest():
    before, after = digests(BEFORE, "1"), digests(BEFORE, "2")

    assert all(before[role] != after[role] for role in before)
