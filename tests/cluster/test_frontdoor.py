"""The front door over real gRPC: streams, finishes, chat, cancellation, health."""


import pytest

from cluster.frontdoor.model import ModelInfo
from cluster.pb.expertmesh.v1 import inference_pb2
from tests.cluster.harness_frontdoor import DEMO, WAIT_S, front_door, saying
from tests.fakes import FakeGateway


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    return ModelInfo.load(DEMO, name="demo")


def text_of(responses) -> str:
    return "".join(response.text for response in responses)


async def test_a_prompt_is_continued_token_by_token(model):
    async with front_door(FakeGateway(saying(model, "the quick brown fox")), model=model) as site:
        request = inference_pb2.GenerateRequest(request_id="a", text="Once", output={"logprobs": 2})
        first, *responses = [r async for r in site.inference.Generate(request, timeout=WAIT_S)]
    assert (first.request_id, first.HasField("seed"), list(first.token_ids)) == ("a", True, [])
    expected = [*model.tokenizer.encode("the quick brown fox"), model.eos_token_ids[0]]
    assert [t for r in responses for t in r.token_ids] == expected
    assert [r.first_token_index for r in responses] == list(range(len(expected)))
    assert text_of(responses) == "the quick brown fox"
    assert all(len(r.logprobs[0].top) == 2 for r in responses)
    finish = responses[-1].finish
    assert finish.reason == inference_pb2.FINISH_REASON_STOP
    assert finish.stop_token_id == model.eos_token_ids[0]
    assert finish.usage.prompt_tokens == len(model.tokenizer.encode("Once"))
    assert finish.usage.completion_tokens == len(expected)
