"""Expert workers in processes of their own, linked to a dispatcher in this one; no Ray."""

import contextlib
import multiprocessing as mp
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cluster.control.planner import place, slots_needed
from tests.bench.harness_plain import plain_worker
from workers.clock import SystemClock
from workers.dispatch.exchange import LinkDispatcher
from workers.dispatch.options import DispatchOptions, MessageShape
from workers.expert.worker import ExpertWorker, WorkerOptions
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig
from workers.placement import Member, MemberId, MemberState, Placement, Role, View

HOST = "127.0.0.1"
START_S = 60.0


def _run(directory: Path, member: MemberId, num_slots: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    worker = ExpertWorker(
        member,
        config=ModelConfig.load(directory),
        checkpoint=Checkpoint(directory),
        num_slots=num_slots,
        options=WorkerOptions(),
        host=HOST,
        clock=SystemClock(),
    )
    view: View = pipe.recv()
    worker.load(view.placement.held_by(member))
    worker.start()
    worker.adopt(view)
    pipe.send("started")
    with contextlib.ExitStack() as changes, contextlib.suppress(EOFError):
        while (order := pipe.recv()) != "end":  # or until the other end is gone
            changes.close()
            if order == "plain":
                changes.enter_context(plain_worker())
            pipe.send(order)
    worker.close()


@dataclass(frozen=True)
class Crew:
    """A dispatcher to expert workers, and a hand on them."""

    dispatcher: LinkDispatcher
    pipes: list[Connection]

    def set_plain(self, *, plain: bool) -> None:
        """Switch recovery off, or on again, at the workers' end; while no call is under way."""
        for pipe in self.pipes:
            pipe.send("plain" if plain else "recover")
            assert pipe.poll(START_S)
            pipe.recv()


@contextlib.contextmanager
def expert_workers(directory: Path, count: int) -> Iterator[Crew]:
    """Start `count` workers that hold a checkpoint's experts."""
    config = ModelConfig.load(directory)
    gateway = MemberId("gateway-0", 1)
    dispatcher = LinkDispatcher(
        gateway,
        0,
        shape=MessageShape(
            hidden_size=config.hidden_size,
            top_k=config.num_experts_per_token,
            dtype=torch.float32,
        ),
        options=DispatchOptions(),
        host=HOST,
        clock=SystemClock(),
    )
    num_slots = slots_needed(config.num_layers, config.num_experts, count, 1)
    crew = {MemberId(f"expert_worker-{i}", 1): num_slots for i in range(count)}
    placement = place(Placement("bench", config.num_layers, config.num_experts), crew, floor=1)
    members = [
        Member(
            id=gateway,
            role=Role.GATEWAY,
            state=MemberState.ACTIVE,
            stores=(dispatcher.store_address,),
        ),
        *(
            Member(id=m, role=Role.EXPERT_WORKER, state=MemberState.ACTIVE, num_slots=num_slots)
            for m in crew
        ),
    ]
    view = View(1, 1, tuple(members), placement)
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for member in crew:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_run, args=(directory, member, num_slots, theirs), daemon=True
        )
        process.start()
        ours.send(view)
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            assert pipe.poll(START_S)
            assert pipe.recv() == "started"
        dispatcher.adopt(view)
        dispatcher.wait_ready(START_S)
        yield Crew(dispatcher, pipes)
    finally:
        dispatcher.close()
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send("end")
        for process in processes:
            process.join(10)
            process.kill()
