"""What of a changed configuration a running cluster takes on at once, and what later: pure."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import orjson

from cluster.config import ClusterConfig
from workers.placement import Role

COUNTS: Mapping[str, Role] = MappingProxyType(
    {
        "gateways.count": Role.GATEWAY,
        "experts.workers": Role.EXPERT_WORKER,
        "front_doors.count": Role.FRONT_DOOR,
    }
)
# The controller alone reads these; one with other values takes over from the one before.
_OF_CONTROLLER = (
    "control.",
    "autoscaler.",
    "experts.floor",
    "experts.min",
    "experts.standby",
    "gateways.standby",
    "experts.max",
    "gateways.cell_ranks",
)
# Both ends of a link, or an answer from its first to its last token, must agree on these; and
# workers' slots are counted for their cells.
_FIXED = (
    "model.path",
    "model.dtype",
    "dispatch.capacity_rows",
    "dispatch.bit_stable",
    "control.cells",
)
_JOURNAL = "control.journal"  # with another one, what runs would be started a second time
_DTYPE = "the dtype (model.dtype, or whether anybody has a GPU)"
_SECTIONS: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        Role.GATEWAY: ("gateways.", "dispatch.", "model.", "telemetry."),
        Role.EXPERT_WORKER: ("experts.", "dispatch.", "model.", "telemetry."),
        Role.FRONT_DOOR: (
            "front_doors.",
            "gateways.context_tokens",
            "gateways.max_deaths",
            "model.",
            "telemetry.",
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Differences:
    """What one configuration has otherwise than another, as `KEY: BEFORE -> AFTER`.

    `counts` are scaled to, `at_once` needs another controller only, `by_rollout` other processes,
    and `never` another cluster.
    """

    counts: tuple[str, ...] = ()
    at_once: tuple[str, ...] = ()
    by_rollout: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


def digests(config: ClusterConfig, build: str) -> Mapping[Role, str]:
    """Return for each role a name of what its processes are started with.

    `build` names the program, such as the tag of its image.
    """
    values = _flat(config)

    def digest(role: Role) -> str:
        mine = {key: values[key] for key in _read_by(role, values)}
        text = orjson.dumps([build, mine], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(text).hexdigest()[:16]

    return {role: digest(role) for role in _SECTIONS}


def differences(before: ClusterConfig, after: ClusterConfig) -> Differences:
    """Compare what runs with what is wanted."""
    old, new = _flat(before), _flat(after)
    by_processes = {key for role in _SECTIONS for key in _read_by(role, new)}
    found: dict[str, list[str]] = {"counts": [], "at_once": [], "by_rollout": [], "never": []}
    for key in sorted(new):
        if old.get(key) == new[key]:
            continue
        moves_experts = key == "experts.workers" and not (old.get(key) and new[key])
        if key in _FIXED or key == _JOURNAL or moves_experts:
            kind = "never"
        elif key in COUNTS:
            kind = "counts"
        else:
            kind = "by_rollout" if key in by_processes else "at_once"
        found[kind].append(f"{key}: {old.get(key)} -> {new[key]}")
    if before.compute_dtype != after.compute_dtype and not found["never"]:
        found["never"].append(f"{_DTYPE}: {before.compute_dtype} -> {after.compute_dtype}")
    return Differences(**{kind: tuple(texts) for kind, texts in found.items()})


def fixed_values(config: ClusterConfig) -> Mapping[str, str]:
    """Return what can never change while a cluster runs, by its dotted key."""
    values = _flat(config)
    return {key: str(values[key]) for key in _FIXED} | {_DTYPE: config.compute_dtype}


def _read_by(role: Role, keys: Iterable[str]) -> list[str]:
    """Return the keys that a role's processes read when they start."""
    return [
        key
        for key in keys
        if key.startswith(_SECTIONS[role])
        and key not in COUNTS
        and not key.startswith(_OF_CONTROLLER)
    ]


def _flat(config: ClusterConfig) -> dict[str, Any]:
    """Return every value by its dotted key; lists and mappings of a user's own are values."""
    tree = config.model_dump(mode="json")
    return dict(_leaves(tree, "", config))


def _leaves(tree: Mapping[str, Any], path: str, section: Any) -> Iterable[tuple[str, Any]]:  # noqa: ANN401
    for key, value in tree.items():
        below = getattr(section, key)
        if hasattr(below, "model_dump"):
            yield from _leaves(value, f"{path}{key}.", below)
        else:
            yield f"{path}{key}", value
