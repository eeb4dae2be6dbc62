"""Are the tokens that clients got those of an undisturbed run? By teacher forcing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.chaos.history import Answer, Ask
from workers.gateway.kv import blocks_for
from workers.gateway.options import GatewayOptions
from workers.gateway.rank import load_rank
from workers.gateway.replay import ReplayReport, replay
from workers.mesh import TensorParallelGroup
from workers.model.config import ModelConfig
from workers.model.gate import GateProbe
from workers.types import Request, Sampling, Stopping


def replays(
    directory: Path, answers: Sequence[Answer], *, bit_stable: bool = False
) -> Iterator[ReplayReport]:
    """Replay every sequence through the experts-in-process reference, one after the other."""
    longest = max(
        (len(a.ask.prompt_token_ids) + a.ask.max_tokens for a in answers),
        default=1,
    )
    config = ModelConfig.load(directory)
    probe = GateProbe(config.num_layers)
    options = GatewayOptions(
        prefix_cache=False,
        context_tokens=longest,
        max_sequences=1,
        num_kv_blocks=blocks_for(longest, GatewayOptions().block_tokens),
        local_experts=True,
        bit_stable=bit_stable,
    )
    model = load_rank(directory, config, options, TensorParallelGroup(), probe=probe)
    for answer in answers:
        for sequence in range(answer.ask.num_sequences):
            tokens = answer.token_ids(sequence)
            if tokens:
                yield replay(
                    model.decoder,
                    model.cache,
                    _request(answer.ask),
                    sequence,
                    tokens,
                    probe=probe,
                    bit_stable=bit_stable,
                )


def _request(ask: Ask) -> Request:
    return Request(
        request_id=f"request {ask.number}",
        prompt_token_ids=ask.prompt_token_ids,
        sampling=Sampling(temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed),
        stopping=Stopping(max_tokens=ask.max_tokens, ignore_eos=True),
        num_sequences=ask.num_sequences,
    )
