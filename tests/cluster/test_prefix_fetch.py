"""A real cluster: a prompt's begin goes from the gateway that keeps it to one that is less busy."""

import threading
import time

import grpc
import pytest

from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from tests.cluster.harness_serve import Served, served, token_ids

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROMPT = list(range(100, 500))


def ask(prompt: list[int], max_tokens: int = 12) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(max_tokens=max_tokens, ignore_eos=True),
    )


def fetched(running: Served) -> dict[str, float]:
    """Return the tokens that each gateway has fetched."""
    return {
        m["name"]: running.metrics(m)[
            f'expertmesh_prefix_fetched_tokens_total{{member="{m["name"]}.{m["incarnation"]}"}}'
        ]
        for m in running.members("GATEWAY")
    }


def test_a_prompt_begins_with_what_the_busier_gateway_keeps_of_it() -> None:
    with served(
        "--gateways", "2", "--tensor-parallel", "2", "--expert-workers", "0",
        "--set", "gateways.prefix_fetch_tokens=64",
    ) as running:  # fmt: skip
        first = list(running.inference.Generate(ask([*PROMPT, 7]), timeout=60))
        assert first[-1].finish.usage.cached_tokens == 0
        again = list(running.inference.Generate(ask([*PROMPT, 7]), timeout=60))
        kept = again[-1].finish.usage.cached_tokens
        assert kept > 300
        assert sum(fetched(running).values()) == 0

        # Now the gateway that keeps it has more to do than fetching costs.
        busy = running.inference.Generate(ask([*PROMPT, 7], max_tokens=2000), timeout=120)
        next(busy)
        reading = threading.Thread(target=_read, args=(busy,))
        reading.start()
        other = list(running.inference.Generate(ask([*PROMPT, 7]), timeout=60))
        busy.cancel()
        reading.join()

        assert token_ids(other) == token_ids(first)
        assert other[-1].finish.usage.cached_tokens == kept
        assert sorted(fetched(running).values()) == [0, kept]


def _read(call: grpc.Call) -> None:
    try:
        for _ in call:
            time.sleep(0)
    except grpc.RpcError:
        pass  # cancelled
