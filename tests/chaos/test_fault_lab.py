"""The fault lab: seeds without a violation, and every guard that is taken away is missed.

`python -m tests.chaos.lab --seed N --trace` replays a seed.
"""

import random

import pytest

from tests.chaos.lab.cluster import run_seed
from tests.chaos.lab.coverage import expected
from tests.chaos.lab.mutations import MUTATIONS
from tests.chaos.lab.scenarios import find_mutations, quiet, run_all

pytestmark = [pytest.mark.timeout(600)]
FIXED_SEEDS, FRESH_SEEDS = 400, 100
LIMIT = 10_000


@pytest.fixture(scope="module", autouse=True)
def silence():
    quiet()


def test_no_invariant_breaks_and_every_pair_of_state_and_event_is_visited() -> None:
    fresh = random.SystemRandom().randrange(10**6, 10**9)
    print(f"fixed seeds 0 to {FIXED_SEEDS - 1}, fresh ones from {fresh}")

    fixed = run_all(0, FIXED_SEEDS, processes=2)
    drawn = run_all(fresh, FRESH_SEEDS, processes=2)

    assert fixed.violations + drawn.violations == []
    visited = fixed.visited + drawn.visited
    assert expected() - set(visited) == set()


def test_a_seed_is_always_the_same_run() -> None:
    first, again = run_seed(11), run_seed(11)

    assert (first.faults, first.trace, first.stats) == (again.faults, again.trace, again.stats)
    assert first.faults


@pytest.fixture(scope="module")
def found():
    return find_mutations(LIMIT, processes=2)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_guard_that_is_taken_away_is_missed(found, name: str) -> None:
    assert found[name] is not None
    print(f"{name}: seed {found[name][0]}: {found[name][1]}")
