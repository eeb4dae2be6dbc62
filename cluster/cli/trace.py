"""`expertmesh trace record`: which experts real prompts activate, recorded in one process."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.control.placing.trace import RoutingTrace
from cluster.frontdoor.model import ModelInfo
from workers.clock import SystemClock
from workers.errors import TraceError
from workers.gateway.engine import EngineOptions, GatewayEngine
from workers.gateway.lockstep import Leader, LoneVote
from workers.gateway.options import GatewayOptions
from workers.gateway.rank import RankModel, load_rank
from workers.mesh import TensorParallelGroup
from workers.model.batch import StepBatch
from workers.model.config import ModelConfig
from workers.model.gate import RoutingProbe
from workers.types import Request, Stopping


class _Recorder:
    """Runs steps as the engine asks for them, and keeps the choices of their rows."""

    def __init__(self, model: RankModel, probe: RoutingProbe) -> None:
        self._model = model
        self._probe = probe
        self._steps: list[NDArray[np.uint16]] = []

    def forward(self, batch: StepBatch) -> Tensor:
        logits = self._model.forward(batch)
        rows = range(batch.num_rows)
        chosen = [[ids_N[row] for row in rows] for ids_N in self._probe.ids_LN]
        self._steps.append(np.array(chosen, dtype=np.uint16).transpose(1, 0, 2))
        return logits

    def trace(self, name: str, num_experts: int) -> RoutingTrace:
        """Return what was recorded."""
        num_rows = np.array([len(step) for step in self._steps], dtype=np.uint32)
        return RoutingTrace(name, num_experts, num_rows, np.concatenate(self._steps))


def record_trace(
    directory: Path,
    questions: Sequence[str],
    *,
    max_tokens: int,
    max_sequences: int = 32,
    seed: int = 0,
) -> RoutingTrace:
    """Answer questions, `max_sequences` at once, and return how the rows were routed.

    Raises:
        CheckpointError: The model is unsupported, incomplete or damaged.
    """
    config, info = ModelConfig.load(directory), ModelInfo.load(directory)
    prompts = [_prompt(info, question) for question in questions]
    options = GatewayOptions(
        local_experts=True,
        prefix_cache=False,
        max_sequences=max_sequences,
        max_waiting=len(prompts),
        context_tokens=max(map(len, prompts)) + max_tokens,
    )
    group, probe = TensorParallelGroup(), RoutingProbe(config.num_layers)
    model = load_rank(directory, config, options, group, probe=probe)
    recorder = _Recorder(model, probe)
    engine = GatewayEngine(
        EngineOptions(
            scheduler=options.scheduler_options(config, group.size),
            vocab_size=config.vocab_size,
            context_tokens=options.context_tokens,
            max_waiting=options.max_waiting,
        ),
        Leader(group, recorder.forward, model.cache, LoneVote()),
        SystemClock(),
    )
    for number, prompt in enumerate(prompts):
        engine.submit(
            Request(
                request_id=f"question {number}",
                prompt_token_ids=prompt,
                sampling=replace(info.sampling, seed=seed + number),
                stopping=Stopping(max_tokens=max_tokens, eos_token_ids=info.eos_token_ids),
            )
        )
    while engine.has_work:
        engine.step()
    return recorder.trace(info.name, config.num_experts)


def _prompt(info: ModelInfo, question: str) -> tuple[int, ...]:
    text = question
    if info.template is not None:
        text = info.template.render([{"role": "user", "content": question}])
    return info.tokenizer.encode(text)


def trace_record_command(
    directory: Path, questions_path: Path, out: Path, *, max_tokens: int, max_sequences: int
) -> None:
    """Record a file of questions, one a line, and say what the trace holds.

    Raises:
        TraceError: The file holds no question.
    """
    questions = [line for line in questions_path.read_text().splitlines() if line.strip()]
    if not questions:
        raise TraceError(f"{questions_path} holds no question: write one a line")
    trace = record_trace(directory, questions, max_tokens=max_tokens, max_sequences=max_sequences)
    trace.save(out)
    print(
        f"{out}: {len(trace.ids_RLK)} rows in {len(trace.rows_S)} steps, {trace.num_layers} layers "
        f"of {trace.num_experts} experts, {out.stat().st_size} bytes"
    )
