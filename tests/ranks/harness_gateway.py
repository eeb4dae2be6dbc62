"""Gateway ranks and expert workers, each in a process of its own, driven over pipes."""

import itertools
import multiprocessing
import threading
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.injection.poison import die_of
from workers.clock import SystemClock
from workers.expert import worker as worker_module
from workers.expert.worker import ExpertWorker, WorkerOptions
from workers.gateway.kv import blocks_for
from workers.gateway.options import GatewayOptions
from workers.gateway.rank import load_rank
from workers.gateway.replay import ReplayReport, replay
from workers.gateway.worker import GatewaySpec, GatewayWorker
from workers.mesh import TensorParallelGroup
from workers.model.batch import Segment, StepBatch
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.model.gate import GateProbe
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
from workers.types import (
    FinishReason,
    GatewayStats,
    Output,
    Request,
    Sampling,
    Stopping,
    TokenEvent,
)

DEMO_MODEL = Path(__file__).parents[2] / "cluster" / "demo"
DEADLINE_S = 90.0
HOST = "127.0.0.1"

Key = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """One sequence as its client saw it."""

    token_ids: tuple[int, ...]
    finish: FinishReason


class GatewayBody:
    """What runs in a gateway rank's process."""

    def __init__(self, spec: GatewaySpec) -> None:
        self.worker = GatewayWorker(spec)
        self._left = 0
        self._tokens: dict[Key, list[int]] = {}
        self._finishes: dict[Key, FinishReason] = {}

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)

    def read(self, attribute: str) -> Any:
        return getattr(self.worker, attribute)

    def wait_for_failure(self) -> str:
        """Return why the rank stopped."""
        self._wait(lambda: self.worker.failure is not None)
        return str(self.worker.failure)

    def wait_until_ready(self) -> None:
        self._wait(lambda: self.worker.ready)

    def wait_until_free(self) -> GatewayStats:
        """Return the first load without a block in use and nothing waiting."""
        self._wait(lambda: not (s := self.worker.stats()).running and not s.waiting)
        return self.worker.stats()

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Poll, since nobody is told of these by design."""
        pause = threading.Event()
        for _ in range(int(DEADLINE_S * 100)):
            if condition():
                return
            pause.wait(0.01)
        raise TimeoutError(self.worker.failure)

    def generate(self, requests: list[Request]) -> dict[Key, Answer]:
        """Run requests together to their ends."""
        self.submit_all(requests)
        self._wait(lambda: self.answers() is not None)
        answers = self.answers()
        assert answers is not None
        return answers

    def submit_all(self, requests: list[Request]) -> None:
        """Begin requests together; token indices must come without gap or repeat."""
        self._left = sum(request.num_sequences for request in requests)
        tokens, finishes = self._tokens, self._finishes = {}, {}

        def sink(events: Iterable[TokenEvent]) -> None:
            for event in events:
                key = (event.request_id, event.sequence_index)
                known = tokens.setdefault(key, [])
                assert event.first_token_index == len(known)
                known.extend(event.token_ids)
                if event.finish is not None:
                    finishes[key] = event.finish

        for request in requests:
            self.worker.submit(request, sink)

    def answers(self) -> dict[Key, Answer] | None:
        """Return what came of the requests; None while some run."""
        if len(self._finishes) < self._left:
            return None
        return {k: Answer(tuple(self._tokens[k]), self._finishes[k]) for k in self._tokens}

    def begin(self, request: Request) -> None:
        """Submit a request and return once its first token is out."""
        started = threading.Event()
        self.worker.submit(request, lambda _: started.set())
        assert started.wait(DEADLINE_S)

    def fail_combines(self, every: int) -> None:
        """Let every n-th combine raise from now on, with the answers still on their way."""
        links = self.worker._links
        combine, calls = links.combine, itertools.count(1)

        def failing(handle: Any) -> torch.Tensor:
            if next(calls) % every == 0:
                raise RuntimeError("planned failure")
            return combine(handle)

        links.combine = failing

    def submit_to_broken_sink(self, request: Request) -> None:
        def sink(_: Iterable[TokenEvent]) -> None:
            raise ConnectionError

        self.worker.submit(request, sink)


class ExpertBody:
    """What runs in an expert worker's process."""

    def __init__(self, member: MemberId, num_slots: int, options: WorkerOptions) -> None:
        self.worker = ExpertWorker(
            member,
            config=ModelConfig.load(DEMO_MODEL),
            checkpoint=Checkpoint(DEMO_MODEL),
            num_slots=num_slots,
            options=options,
            host=HOST,
            clock=SystemClock(),
        )

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)

    def die_of(self, row: list[float]) -> None:
        """End this process when it is to compute this row, but for rounding."""
        die_of(worker_module, row)


class Remote:
    """An object in a process of its own; calls are sent to it one at a time."""

    def __init__(self, make: Any, *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "tests.ranks.harness_gateway"])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, method: str, *args: Any) -> None:
        self._pipe.send((method, args))

    def result(self) -> Any:
        if not self._pipe.poll(DEADLINE_S + 10):
            self.kill()
            raise TimeoutError
        failure, result = self._pipe.recv()
        assert not failure, failure
        return result

    def __call__(self, method: str, *args: Any) -> Any:
        self.send(method, *args)
        return self.result()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


class Gateway:
    """All ranks of one gateway."""

    def __init__(
        self,
        size: int,
        options: GatewayOptions,
        model_dir: Path = DEMO_MODEL,
        body: Any = GatewayBody,
    ) -> None:
        self.member = MemberId("gateway", 1)
        self.ranks = [
            Remote(
                body,
                GatewaySpec(
                    member=self.member,
                    rank=rank,
                    size=size,
                    host=HOST,
                    model_dir=str(model_dir),
                    options=options,
                ),
            )
            for rank in range(size)
        ]
        self.stores = tuple(self.all("call", "open"))
        rendezvous = self.ranks[0]("call", "rendezvous")
        self.all("call", "join", rendezvous)
        self.memory = self.all("call", "load")

    def start(self) -> None:
        self.all("call", "start")

    def all(self, method: str, *args: Any) -> list[Any]:
        for rank in self.ranks:
            rank.send(method, *args)
        return [rank.result() for rank in self.ranks]

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()


class Experts:
    """Expert workers that share the experts of the demo model out, `floor` copies of each."""

    def __init__(self, count: int, *, floor: int = 1, bit_stable: bool = False) -> None:
        config = ModelConfig.load(DEMO_MODEL)
        self.members = [MemberId(f"expert-{i}", 1) for i in range(count)]
        held: list[dict[ExpertId, int]] = [{} for _ in range(count)]
        replicas: dict[ExpertId, tuple[Replica, ...]] = {}
        for layer in range(config.num_layers):
            for expert in range(config.num_experts):
                id_ = ExpertId(layer, expert)
                workers = [(layer + expert + copy) % count for copy in range(floor)]
                replicas[id_] = tuple(
                    Replica(self.members[w], held[w].setdefault(id_, len(held[w]))) for w in workers
                )
        self.placement = Placement("demo", config.num_layers, config.num_experts, replicas)
        options = WorkerOptions(bit_stable=bit_stable, num_threads=1)
        self.workers = [
            Remote(ExpertBody, member, len(slots), options)
            for member, slots in zip(self.members, held, strict=True)
        ]
        for worker, slots in zip(self.workers, held, strict=True):
            worker.send("call", "load", slots)
        for worker in self.workers:
            worker.result()
            worker("call", "start")

    def view(
        self,
        gateway: Gateway,
        *,
        gone: Collection[MemberId] = (),
        warm: Collection[MemberId] = (),
        version: int = 1,
    ) -> View:
        """Return the View of these workers and one gateway."""
        gateways = Member(
            id=gateway.member, role=Role.GATEWAY, state=MemberState.ACTIVE, stores=gateway.stores
        )
        workers = tuple(
            Member(
                id=member,
                role=Role.EXPERT_WORKER,
                state=MemberState.GONE
                if member in gone
                else MemberState.WARM
                if member in warm
                else MemberState.ACTIVE,
            )
            for member in self.members
        )
        return View(1, version, (gateways, *workers), self.placement)

    def serve(self, gateway: Gateway, *, warm: Collection[MemberId] = ()) -> None:
        """Bring a gateway and these workers together; returns when all experts are in reach."""
        view = self.view(gateway, warm=warm)
        for remote in (*self.workers, *gateway.ranks):
            remote("call", "adopt", view)
        gateway.start()
        gateway.all("wait_until_ready")

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()


def options_for(**changes: Any) -> GatewayOptions:
    defaults = GatewayOptions(
        max_sequences=16,
        step_tokens=128,
        num_kv_blocks=200,
        context_tokens=400,
        local_experts=True,
        group_timeout_s=30.0,
    )
    return replace(defaults, **changes)


def mixed_requests(count: int, *, longest: int = 12) -> list[Request]:
    """Return prompts of mixed lengths under mixed settings."""
    generator = torch.Generator().manual_seed(7)
    lengths, budgets = (1, 5, 63, 64, 65, 130), (longest, longest // 2, longest // 3)
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=tuple(
                torch.randint(3, 4000, (lengths[i % 6],), generator=generator).tolist()
            ),
            sampling=Sampling(
                temperature=(0.0, 0.7, 1.0)[i % 3],
                top_k=(0, 20)[i % 2],
                top_p=(1.0, 0.95)[i % 2],
                repetition_penalty=(1.0, 1.1)[i % 4 == 0],
                seed=i,
            ),
            stopping=Stopping(max_tokens=budgets[i % 3]),
            output=Output(logprobs=1) if i % 5 == 0 else Output(),
            num_sequences=1 + (i % 7 == 3),
        )
        for i in range(count)
    ]


class Reference:
    """The model in this process, over a LocalDispatcher: says what is right."""

    def __init__(self, *, bit_stable: bool = False, model_dir: Path = DEMO_MODEL) -> None:
        torch.set_num_threads(1)
        self.bit_stable = bit_stable
        config = ModelConfig.load(model_dir)
        self.probe = GateProbe(config.num_layers)
        options = options_for(max_sequences=1, num_kv_blocks=40, bit_stable=bit_stable)
        group = TensorParallelGroup()
        self.model = load_rank(model_dir, config, options, group, probe=self.probe)

    def row_of(self, token_ids: tuple[int, ...], layer: int) -> list[float]:
        """Return what is sent to the experts of a layer for the last token of a prompt."""
        dispatcher, seen = self.model.dispatcher, []
        dispatch = dispatcher.dispatch

        def watching(at: int, x_TD: torch.Tensor, *more: Any) -> Any:
            if at == layer:
                seen.append(x_TD[-1].tolist())
            return dispatch(at, x_TD, *more)

        blocks = tuple(range(blocks_for(len(token_ids), self.model.cache.block_tokens)))
        segment = Segment(token_ids=token_ids, start=0, state_block=0, kv_blocks=blocks)
        dispatcher.dispatch = watching  # type: ignore[method-assign]
        self.model.forward(StepBatch(segments=(segment,)))
        self.model.cache.discard()
        dispatcher.dispatch = dispatch  # type: ignore[method-assign]
        return seen[0]

    def check(self, requests: list[Request], answers: dict[Key, Answer]) -> list[ReplayReport]:
        """Replay every answer; each must be whole and right."""
        reports = []
        for request in requests:
            for index in range(request.num_sequences):
                answer = answers[request.request_id, index]
                assert answer.finish is FinishReason.LENGTH
                assert len(answer.token_ids) == request.stopping.max_tokens
                report = replay(
                    self.model.decoder,
                    self.model.cache,
                    request,
                    index,
                    answer.token_ids,
                    probe=self.probe,
                    bit_stable=self.bit_stable,
                )
                print(report) if report.mismatches else None
                assert report.is_right, report
                reports.append(report)
        return reports


def _serve(pipe: Connection, make: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    target = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            target = target or make(*args)
            pipe.send(("", getattr(target, method)(*arguments)))
        except Exception:  # noqa: BLE001 - reported by the parent
            pipe.send((traceback.format_exc(), None))
