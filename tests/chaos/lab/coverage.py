"""Which pairs of state and event a batch of seeds has visited, of members, calls and cells."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cluster.control.controller import Controller
from cluster.control.lifecycle import PHASES, Life, Phase
from cluster.control.ports import Died, Leaving, Raised, Returned
from tests.chaos.lab.mutations import replaced
from workers.dispatch.recovery import Attempt, LayerCall
from workers.placement import NO_CELL, Role, View

Visited = Counter[tuple[str, str]]

# What cannot happen, and why.
UNREACHABLE = {
    ("expert_worker drain", "Returned load"): "a worker drains when nothing is under way",
    ("expert_worker open", "Returned start"): "nothing is asked of a phase to come",
    ("first attempt", "late reply"): "a late reply finds no call: LayerCall never sees it",
}


def expected() -> set[tuple[str, str]]:
    """Return the pairs that a batch must visit."""
    pairs = set()
    for role in (Role.EXPERT_WORKER, Role.GATEWAY):
        for phase in PHASES[role]:
            if phase not in {Phase.STANDBY, Phase.SERVE}:
                pairs.add((f"{role.value} {phase.value}", f"Returned {phase.value}"))
    for phase in (*PHASES[Role.EXPERT_WORKER], Phase.DRAIN):
        pairs.add((f"expert_worker {phase.value}", "Died"))
    pairs |= {
        ("expert_worker serve", "Returned load"),
        ("expert_worker serve", "Returned pulse"),
        ("expert_worker standby", "Returned pulse"),
        ("expert_worker drain", "Returned drain"),
        ("gateway serve", "Returned pulse"),
        ("first attempt", "whole reply"),
        ("first attempt", "partial reply"),
        ("first attempt", "empty reply"),
        ("first attempt", "given up"),
        ("first attempt", "hedged"),
        ("later attempt", "whole reply"),
        ("later attempt", "given up"),
        ("hedged attempt", "whole reply"),
        ("hedged attempt", "given up"),
        ("cell", "keeps to itself"),
        ("cell", "borrows"),
    }
    return pairs - UNREACHABLE.keys()


def _state(attempt: Attempt | None) -> str:
    if attempt is None:
        return "nothing outstanding"
    if attempt.groups:
        return "hedged attempt"
    return "first attempt" if attempt.number == 1 else "later attempt"


@contextlib.contextmanager
def observing() -> Iterator[Visited]:
    """Count what members and calls go through, for as long as the context lasts."""
    visited: Visited = Counter()
    hear, reply = Controller._hear, LayerCall.reply
    give_up, hedge, within = LayerCall.give_up, LayerCall.hedge, View.within

    def heard(self: Controller, event: Any) -> None:
        life: Life | None = self._lives.get(event.process.member)
        if life is not None:
            match event:
                case Returned(_, method, _):
                    what = f"Returned {method}"
                case Raised(_, method, _):
                    what = f"Raised {method}"
                case Died():
                    what = "Died"
                case Leaving():
                    what = "Leaving"
            visited[f"{life.role.value} {life.phase.value}", what] += 1
        hear(self, event)

    def replied(self: LayerCall, message_id: int, worker: Any, incarnation: int, summed_R: Any,
                payload: Any) -> Attempt | None:  # fmt: skip
        attempt = self.outstanding.get(message_id)
        state = _state(attempt)
        asked = attempt.pairs.masks_R if attempt is not None else summed_R
        taken = reply(self, message_id, worker, incarnation, summed_R, payload)
        if taken is None:
            what = "late reply"
        elif not summed_R.any():
            what = "empty reply"
        else:
            what = "whole reply" if (summed_R == asked).all() else "partial reply"
        visited[state, what] += 1
        return taken

    def given_up(self: LayerCall, attempt: Attempt) -> None:
        visited[_state(attempt), "given up"] += 1
        give_up(self, attempt)

    def hedged(self: LayerCall, attempt: Attempt) -> Any:
        visited[_state(attempt), "hedged"] += 1
        return hedge(self, attempt)

    def narrowed(self: View, cell: int | None) -> View:
        mine = within(self, cell)
        if mine is not self:
            workers = mine.with_role(Role.EXPERT_WORKER)
            borrows = any(m.cell not in {cell, NO_CELL} for m in workers)
            visited["cell", "borrows" if borrows else "keeps to itself"] += 1
        return mine

    with (
        replaced(Controller, "_hear", heard),
        replaced(View, "within", narrowed),
        replaced(LayerCall, "reply", replied),
        replaced(LayerCall, "give_up", given_up),
        replaced(LayerCall, "hedge", hedged),
    ):
        yield visited
