"""Chat rendering equals transformers', text and tokens."""

import pytest
from transformers import PreTrainedTokenizerFast

from cluster.frontdoor import translate
from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.template import starts_in_reasoning
from cluster.pb.expertmesh.v1 import inference_pb2
from tests.unit.harness_published import DEMO, published_directory
from workers.errors import InvalidRequestError

WEATHER = {
    "name": "get_weather",
    "description": 'Tells the weather; <b>now</b> & "today".',
    "parameters": '{"type": "object", "properties": {"city": {"type": "string", "description":'
    ' "Größe & <Ort>"}, "days": {"type": "integer"}}, "required": ["city"]}',
}
CALL = {
    "id": "call_1",
    "name": "get_weather",
    "arguments": '{"city": "Zürich", "days": 2, "loud": true, "at": [1.0, null], "more": {"a": 1}}',
}
CONVERSATIONS = {
    "one question": [{"role": "user", "content": "  What is the capital of France?\n"}],
    "system message": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi 👋"},
    ],
    "several turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning": "One and one\nis two."},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
        {"role": "user", "content": "Thanks."},
    ],
    "tool call and result": [
        {"role": "user", "content": "Weather in Zürich?"},
        {"role": "assistant", "content": "", "reasoning": "I call it.", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "clear"}', "tool_call_id": "call_1"},
    ],
    "two calls, two results, an answer, a question": [
        {"role": "system", "content": "You call tools."},
        {"role": "user", "content": "Zürich and Rome?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "clear"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Clear and rain.", "reasoning": "Both are here."},
        {"role": "user", "content": "And tomorrow?"},
    ],
}


@pytest.fixture(scope="module")
def demo():
    return DEMO, ModelInfo.load(DEMO)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = published_directory(tmp_path_factory)
    return directory, ModelInfo.load(directory)


@pytest.fixture(params=["demo", "published"])
def served(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def oracles():
    return {}


def oracle_of(oracles, directory):
    """Return transformers' tokenizer of a model directory."""
    if directory not in oracles:
        oracles[directory] = PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"),
            chat_template=(directory / "chat_template.jinja").read_text(),
        )
    return oracles[directory]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_conversation_is_rendered_as_transformers_does(
    served, oracles, conversation, with_tools, thinking
):
    directory, model = served
    oracle = oracle_of(oracles, directory)
    request = inference_pb2.ChatRequest(
        messages=CONVERSATIONS[conversation], tools=[WEATHER] if with_tools else []
    )
    messages, tools = translate.messages_of(request), translate.tools_of(request)
    prompt = model.template.render(messages, tools, thinking)
    extra = {} if thinking is None else {"enable_thinking": thinking}
    wanted = {"tools": tools or None, "add_generation_prompt": True, **extra}
    assert prompt == oracle.apply_chat_template(messages, tokenize=False, **wanted)
    token_ids = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **wanted)
    assert model.tokenizer.encode(prompt) == tuple(token_ids)
    assert starts_in_reasoning(prompt) == (thinking is not False)


def test_what_the_template_refuses_is_the_callers_mistake(served):
    _, model = served
    turns = [{"role": "user", "content": "a"}, {"role": "system", "content": "late"}]
    with pytest.raises(InvalidRequestError, match="messages: the chat template refuses them"):
        model.template.render(turns)
