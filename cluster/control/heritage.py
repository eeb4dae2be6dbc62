"""Whether a controller may go on where an earlier one's journal ends: pure."""

from collections.abc import Collection
from types import MappingProxyType

from cluster.control.options import Desired
from cluster.control.ports import Record
from workers.placement import Placement

_BEFORE = MappingProxyType({"control.cells": "1"})  # what older programs' records do not tell
_MOST_NAMED = 4


def usable(
    record: Record | None,
    desired: Desired,
    model: Placement,
    running: Collection[str] = (),
) -> tuple[Record | None, str]:
    """Return what an earlier controller left, unless that was another cluster.

    Then, when members of that one may still run, the reason why nothing may be done. So too when
    no members are known and yet processes are `running`: they would be started a second time.
    """
    if record is None:
        return None, _refusal_of(running)
    differing = [
        f"{key} was {value}"
        for key, value in {**_BEFORE, **record.fixed}.items()
        if desired.fixed.get(key, value) != value
    ]
    if not record.view.placement.is_like(model):
        differing.append("the checkpoint was another one")
    if not differing:
        is_lost = not record.view.members and bool(running)
        return (None, _refusal_of(running)) if is_lost else (record, "")
    if not record.view.members:
        return None, _refusal_of(running)
    return None, (
        f"the journal is that of a cluster which cannot take this on: {'; '.join(differing)}. "
        "Apply its own configuration again, then `expertmesh down`; if nothing of it runs any "
        "more, empty control.journal or name another directory"
    )


def _refusal_of(running: Collection[str]) -> str:
    """Say why a controller that knows nothing may not begin beside these processes."""
    if not running:
        return ""
    more = ", ..." if len(running) > _MOST_NAMED else ""
    named = ", ".join(sorted(running)[:_MOST_NAMED]) + more
    return (
        f"the journal knows no member, yet {len(running)} processes of a cluster run here: "
        f"{named}. They go on to serve, and are not started again beside themselves: give "
        "control.journal its contents back and apply again, or `expertmesh down` ends them"
    )
