"""A pool of processes, each one rank: started once, used by many tests.

Task functions are module-level and take the rank's group first; their arguments and results are
pickled. A wait that passes its deadline kills the pool.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from workers.mesh import Rendezvous, TensorParallelGroup

DEADLINE_S = 60.0


class RankPool:
    """Up to `max_size` ranks; a task runs on the first `size` of them, as one group."""

    def __init__(self, max_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "tests.conformance.harness_model"])
        self._store = dist.TCPStore(
            "127.0.0.1",
            0,
            is_master=True,
            timeout=timedelta(seconds=DEADLINE_S),
            wait_for_workers=False,
        )
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(max_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self._store.port), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int, task: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a task on ranks 0 to size - 1; returns their results, by rank."""
        for pipe in self._pipes[:size]:
            pipe.send((size, task, args))
        results = []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(DEADLINE_S):
                self.close()
                raise TimeoutError(f"rank {rank} of {size} did not finish {task.__name__}")
            failure, result = pipe.recv()
            if failure:
                self.close()
                raise AssertionError(f"rank {rank} of {size}:\n{failure}")
            results.append(result)
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join(DEADLINE_S)


def _serve(pipe: Connection, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    groups: dict[int, TensorParallelGroup] = {}
    with contextlib.suppress(EOFError):
        while True:
            size, task, args = pipe.recv()
            try:
                if size not in groups:
                    rendezvous = Rendezvous("127.0.0.1", port, f"pool-{size}")
                    groups[size] = TensorParallelGroup(
                        rank, size, rendezvous if size > 1 else None, timeout_s=DEADLINE_S
                    )
                pipe.send(("", task(groups[size], *args)))
            except Exception:  # noqa: BLE001 - reported by the parent
                pipe.send((traceback.format_exc(), None))
