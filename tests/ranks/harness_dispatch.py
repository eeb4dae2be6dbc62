"""Expert workers as processes, with a pipe to each; experts on disk; the dense reference."""

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.unit.harness_checkpoint import tiny_config, write_checkpoint
from workers.clock import SystemClock
from workers.dispatch.exchange import DispatchOptions, LinkDispatcher, MessageShape
from workers.expert import worker as worker_module
from workers.expert.worker import ExpertWorker, WorkerOptions
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.placement import (
    ExpertId,
    Member,
    MemberId,
    MemberState,
    Placement,
    Replica,
    Role,
    View,
)

HOST = "127.0.0.1"
DEADLINE_S = 60.0
LAYERS, HIDDEN, WIDTH = 2, 24, 10
POISON = 666.0  # a row of it ends the worker that computes it


class Experts:
    """Random experts on disk and in memory."""

    def __init__(self, directory: Path, num_experts: int, top_k: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.directory = directory
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate_up = torch.randn(LAYERS, num_experts, 2 * WIDTH, HIDDEN, generator=draw) / 5
        self.down = torch.randn(LAYERS, num_experts, HIDDEN, WIDTH, generator=draw) / 3
        tensors = {}
        for layer in range(LAYERS):
            base = f"model.layers.{layer}.mlp.experts."
            tensors[f"{base}gate_up_proj"] = self.gate_up[layer].clone()
            tensors[f"{base}down_proj"] = self.down[layer].clone()
        tensors["model.embed_tokens.weight"] = torch.zeros(50, HIDDEN)
        config = tiny_config(num_experts=num_experts, num_experts_per_tok=top_k)
        write_checkpoint(directory, tensors, config)

    def dense(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Every row through each of its experts, in float64."""
        x, weights = x_TD.double(), weights_TK.double()
        gate_up, down = self.gate_up[layer].double()[ids_TK], self.down[layer].double()[ids_TK]
        gate, up = torch.einsum("tkih,th->tki", gate_up, x).chunk(2, -1)
        return torch.einsum("tkhi,tki,tk->th", down, functional.silu(gate) * up, weights)


class WorkerProcess:
    """An `ExpertWorker` in a process of its own, driven through a pipe."""

    def __init__(self, directory: Path, name: str, num_slots: int, options: WorkerOptions) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks.harness_dispatch"])
        self.id = MemberId(name, 1)
        self.num_slots = num_slots
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, directory, self.id, num_slots, options), daemon=True
        )
        self.process.start()
        theirs.close()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker and return its result."""
        self._pipe.send((method, args))
        assert self._pipe.poll(DEADLINE_S), method
        ok, result = self._pipe.recv()
        assert ok, result
        return result

    def signal(self, number: signal.Signals) -> None:
        """Send a signal: kill, stop or continue."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join(DEADLINE_S)


def _serve(
    pipe: Any, directory: Path, member: MemberId, num_slots: int, options: WorkerOptions
) -> None:
    torch.set_num_threads(1)
    compute_batch = worker_module.compute_batch

    def die_of_poison(calls: Any, *more: Any) -> Any:
        rows = [call.frame.rows(call.header.num_rows).values_RH for call in calls]
        if any(bool((values_RH[:, 0] == POISON).any()) for values_RH in rows):
            os._exit(1)
        return compute_batch(calls, *more)

    worker_module.compute_batch = die_of_poison
    worker = ExpertWorker(
        member,
        config=ModelConfig.load(directory),
        checkpoint=Checkpoint(directory),
        num_slots=num_slots,
        options=options,
        host=HOST,
        clock=SystemClock(),
    )
    while True:
        method, args = pipe.recv()
        try:
            pipe.send((True, getattr(worker, method)(*args)))
        except Exception as error:  # noqa: BLE001 - told to the test
            pipe.send((False, repr(error)))


class Cluster:
    """Worker processes, dispatchers in this process, and the View that they share."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.workers: dict[str, WorkerProcess] = {}
        self.dispatchers: list[LinkDispatcher] = []
        self.version = 0
        self.states: dict[str, MemberState] = {}
        self.holdings: dict[str, dict[ExpertId, int]] = {}

    def add_worker(self, name: str, held: Sequence[ExpertId], **options: Any) -> WorkerProcess:
        """Start a worker process that holds some experts."""
        num_slots = LAYERS * self.experts.num_experts
        worker = WorkerProcess(
            self.experts.directory, name, num_slots, WorkerOptions(num_threads=1, **options)
        )
        self.workers[name] = worker
        self.states[name] = MemberState.ACTIVE
        self.load(name, held)
        worker.call("start")
        return worker

    def load(self, name: str, held: Sequence[ExpertId]) -> None:
        """Load experts into a worker's next slots."""
        mine = self.holdings.setdefault(name, {})
        new = {expert: len(mine) + i for i, expert in enumerate(held)}
        self.workers[name].call("load", new)
        mine.update(new)

    def add_dispatcher(self, options: DispatchOptions | None = None) -> LinkDispatcher:
        """Make a dispatcher as another gateway would."""
        dispatcher = LinkDispatcher(
            MemberId(f"gateway-{len(self.dispatchers)}", 1),
            0,
            shape=MessageShape(hidden_size=HIDDEN, top_k=self.experts.top_k, dtype=torch.float32),
            options=options or DispatchOptions(),
            host=HOST,
            clock=SystemClock(),
        )
        self.dispatchers.append(dispatcher)
        return dispatcher

    def view(self) -> View:
        """Return the next View."""
        self.version += 1
        replicas: dict[ExpertId, list[Replica]] = {}
        for name in sorted(self.holdings):
            for expert, slot in self.holdings[name].items():
                replicas.setdefault(expert, []).append(Replica(self.workers[name].id, slot))
        members = [
            Member(
                id=MemberId(f"gateway-{i}", 1),
                role=Role.GATEWAY,
                state=MemberState.ACTIVE,
                stores=(dispatcher.store_address,),
            )
            for i, dispatcher in enumerate(self.dispatchers)
        ]
        members += [
            Member(
                id=worker.id,
                role=Role.EXPERT_WORKER,
                state=self.states[name],
                num_slots=worker.num_slots,
            )
            for name, worker in self.workers.items()
        ]
        placement = Placement(
            "test", LAYERS, self.experts.num_experts, {e: tuple(r) for e, r in replicas.items()}
        )
        return View(1, self.version, tuple(members), placement)

    def publish(self) -> View:
        """Give the next View to everybody who is alive."""
        view = self.view()
        for worker in self.workers.values():
            if worker.process.is_alive() and self.states[worker.id.name] is not MemberState.GONE:
                worker.call("adopt", view)
        for dispatcher in self.dispatchers:
            dispatcher.adopt(view)
        return view

    def ready(self) -> None:
        """Publish, and wait until every dispatcher has a link to every worker."""
        self.publish()
        count = sum(state is not MemberState.GONE for state in self.states.values())
        end = time.monotonic() + DEADLINE_S
        for dispatcher in self.dispatchers:
            dispatcher.wait_ready(DEADLINE_S)
            while dispatcher.stats()["links"] < count:
                assert time.monotonic() < end
                time.sleep(0.005)

    def close(self) -> None:
        """End everything."""
        for dispatcher in self.dispatchers:
            dispatcher.close()
        for worker in self.workers.values():
            worker.end()


def all_experts(num_experts: int) -> list[ExpertId]:
    """Every expert of every layer."""
    return [ExpertId(layer, e) for layer in range(LAYERS) for e in range(num_experts)]


def spread(num_experts: int, num_workers: int, copies: int = 1) -> list[list[ExpertId]]:
    """Deal experts to workers, round robin; copies go to the next workers."""
    dealt: list[list[ExpertId]] = [[] for _ in range(num_workers)]
    for index, expert in enumerate(all_experts(num_experts)):
        for copy in range(min(copies, num_workers)):
            dealt[(index + copy) % num_workers].append(expert)
    return dealt


def gating(kind: str, num_rows: int, experts: Experts, seed: int = 0) -> tuple[Tensor, ...]:
    """Draw x_TD, expert_ids_TK and weights_TK; `kind` is random, hot (one expert in all), same."""
    draw = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_rows, HIDDEN, generator=draw)
    noise = torch.rand(num_rows, experts.num_experts, generator=draw)
    if kind == "hot":
        noise[:, experts.num_experts // 2] = 2.0
    if kind == "same" and num_rows:
        noise = noise[:1].expand(num_rows, -1)
    weights, ids = noise.topk(experts.top_k, dim=-1)
    return x_TD, ids.contiguous(), weights.softmax(-1)


def close_to(got: Tensor, wanted: Tensor) -> bool:
    """Whether a float32 result is the float64 one but for rounding."""
    return bool(torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5))


def held_by(dealt: Sequence[Sequence[ExpertId]]) -> Mapping[str, Sequence[ExpertId]]:
    """Name the workers of a deal."""
    return {f"worker-{i}": held for i, held in enumerate(dealt)}
