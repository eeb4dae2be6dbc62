"""The scenarios of the lab, run by seed."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context

import structlog
import torch

from tests.chaos.lab.cluster import run_seed
from tests.chaos.lab.coverage import Visited, observing
from tests.chaos.lab.mutations import MUTATIONS
from tests.chaos.lab.ranks import run_ranks
from tests.chaos.lab.requests import run_requests

CHUNK = 50


@dataclass(slots=True)
class Batch:
    """What came of some seeds: violations by (scenario, seed), and what was visited."""

    violations: list[tuple[str, int, str]] = field(default_factory=list)
    visited: Visited = field(default_factory=Visited)


def quiet() -> None:
    """Keep the product's logs out of the lab's output."""
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    torch.set_num_threads(1)


SCENARIOS: dict[str, Callable[[int], str]] = {
    "cluster": lambda seed: run_seed(seed).violation,
    "ranks": run_ranks,
    "requests": run_requests,
}


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Leave cycles until the batch has ended: looking for them takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_batch(seeds: Iterable[int]) -> Batch:
    """Run all scenarios on some seeds."""
    batch = Batch()
    gc.collect()
    with observing() as visited, _without_gc():
        for seed in seeds:
            for name, run in SCENARIOS.items():
                if violation := run(seed):
                    batch.violations.append((name, seed, violation))
    batch.visited = visited
    return batch


def run_all(
    first: int,
    count: int,
    processes: int,
    on_progress: Callable[[int, Batch], None] = lambda _num_seeds, _so_far: None,
) -> Batch:
    """Run a range of seeds on several processes; `on_progress` is told how far it is."""
    chunks = [
        range(start, min(start + CHUNK, first + count))
        for start in range(first, first + count, CHUNK)
    ]
    whole = Batch()
    with get_context("spawn").Pool(processes, initializer=quiet) as pool:
        for number, batch in enumerate(pool.imap_unordered(run_batch, chunks), start=1):
            whole.violations += batch.violations
            whole.visited += batch.visited
            on_progress(min(number * CHUNK, count), whole)
    return whole


def find_mutation(name: str, limit: int, first: int = 0) -> tuple[int, str] | None:
    """Return the first seed at which a mutation shows, and how; None within the limit."""
    mutation = MUTATIONS[name]
    run = SCENARIOS[mutation.scenario]
    with mutation.apply():
        for seed in range(first, first + limit):
            if violation := run(seed):
                return seed, violation
    return None


def find_mutations(limit: int, processes: int) -> dict[str, tuple[int, str] | None]:
    """Look for all mutations, several at once."""
    with get_context("spawn").Pool(processes, initializer=quiet) as pool:
        found = pool.imap(partial(find_mutation, limit=limit), list(MUTATIONS))
        return dict(zip(MUTATIONS, found, strict=True))
