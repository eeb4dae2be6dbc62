"""Whether a controller may go on where an earlier one's journal ends: pure."""

from types import MappingProxyType

from cluster.control.options import Desired
from cluster.control.ports import Record
from workers.placement import Placement

_BEFORE = MappingProxyType({"control.cells": "1"})  # what older programs' records do not tell


def usable(record: Record | None, desired: Desired, model: Placement) -> tuple[Record | None, str]:
    """Return what an earlier controller left, unless that was another cluster.

    Then, when members of that one may still run, the reason why nothing may be done.
    """
    if record is None:
        return None, ""
    differing = [
        f"{key} was {value}"
        for key, value in {**_BEFORE, **record.fixed}.items()
        if desired.fixed.get(key, value) != value
    ]
    if not record.view.placement.is_like(model):
        differing.append("the checkpoint was another one")
    if not differing:
        return record, ""
    if not record.view.members:
        return None, ""
    return None, (
        f"the journal is that of a cluster which cannot take this on: {'; '.join(differing)}. "
        "Apply its own configuration again, then `expertmesh down`; if nothing of it runs any "
        "more, empty control.journal or name another directory"
    )
