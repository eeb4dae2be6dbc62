"""The demo model's chat template draws turns exactly as its training text did."""

import json
import random

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.demo.path import demo_model_path
from examples.demo_model import corpus

NUM_DRAWS = 300


def raise_exception(message):
    raise TemplateError(message)


def compiled(**whitespace):
    """Compile the template as a front door does: sandboxed, with a plain `tojson`."""
    environment = ImmutableSandboxedEnvironment(**whitespace)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string((demo_model_path() / "chat_template.jinja").read_text())


@pytest.fixture(scope="module")
def template():
    return compiled(trim_blocks=True, lstrip_blocks=True)


def drawn_dialogues():
    r = random.Random(11)
    for _ in range(NUM_DRAWS):
        thinking = r.random() < 0.5
        questions = corpus.joined([corpus.question(r) for _ in range(r.randrange(1, 4))])
        for dialogue in (questions, corpus.errand(r)):
            yield dialogue if thinking else corpus.silent(dialogue)


def rendered(template, dialogue, **options):
    return template.render(messages=dialogue.messages, tools=list(dialogue.tools), **options)


def test_jinja_renders_messages_as_the_corpus_writes_them(template):
    for dialogue in drawn_dialogues():
        assert corpus.written(dialogue) == rendered(template, dialogue)


def test_whitespace_control_of_the_environment_does_not_matter(template):
    bare = compiled()

    for dialogue in list(drawn_dialogues())[:50]:
        assert rendered(template, dialogue) == rendered(bare, dialogue)


def test_every_assistant_turn_begins_with_the_generation_prompt(template):
    for dialogue in list(drawn_dialogues())[:100]:
        whole = corpus.written(dialogue)
        for n, message in enumerate(dialogue.messages):
            if message["role"] != "assistant":
                continue
            prompt = template.render(
                messages=dialogue.messages[:n],
                tools=list(dialogue.tools),
                add_generation_prompt=True,
                enable_thinking="reasoning_content" in message,
            )

            assert whole.startswith(prompt)


def test_thinking_is_on_unless_it_is_turned_off(template):
    messages = [corpus.user("Speak some verse.")]
    options = {"messages": messages, "add_generation_prompt": True}

    assert template.render(**options).endswith("<|im_start|>assistant\n<think>\n")
    assert template.render(**options, enable_thinking=True) == template.render(**options)
    assert template.render(**options, enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_a_system_message_stands_alone_or_below_the_tools(template):
    messages = [{"role": "system", "content": "Be brief."}, corpus.user("Hello")]
    alone = template.render(messages=messages)
    below = template.render(messages=messages, tools=[corpus.tool_schema("calculate")])

    assert alone.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello")
    assert "</tools>\n\nBe brief.<|im_end|>\n<|im_start|>user\nHello" in below


def test_results_of_calls_made_together_share_one_turn(template):
    calls = [{"function": {"name": "get_order", "arguments": {"order_id": n}}} for n in (1, 2)]
    messages = [
        corpus.user("Look both up."),
        {"role": "assistant", "content": "I will.", "tool_calls": calls},
        corpus.result({"order_id": 1}),
        corpus.result({"order_id": 2}),
    ]
    text = template.render(messages=messages)

    assert "I will.\n\n<tool_call>\n<function=get_order>\n" in text
    assert "</tool_call>\n<tool_call>" in text
    assert text.endswith(
        '<|im_start|>user\n<tool_response>\n{"order_id": 1}\n</tool_response>\n'
        '<tool_response>\n{"order_id": 2}\n</tool_response><|im_end|>\n'
    )


def test_arguments_that_are_not_strings_are_drawn_as_json(template):
    arguments = {"deep": {"a": [1, True, None]}, "yes": True, "n": 1.5, "text": "a < b & 'c'"}
    call = {"function": {"name": "f", "arguments": arguments}}
    text = template.render(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])

    assert '<parameter=deep>\n{"a": [1, true, null]}\n</parameter>' in text
    assert "<parameter=yes>\ntrue\n</parameter>" in text
    assert "<parameter=n>\n1.5\n</parameter>" in text
    assert "<parameter=text>\na < b & 'c'\n</parameter>" in text


def test_a_call_may_have_no_arguments(template):
    call = {"function": {"name": "now", "arguments": {}}}
    text = template.render(messages=[{"role": "assistant", "content": "", "tool_calls": [call]}])

    assert "<tool_call>\n<function=now>\n</function>\n</tool_call><|im_end|>" in text


def test_text_parts_are_joined(template):
    parts = [{"type": "text", "text": "Speak "}, {"type": "text", "text": "now."}]

    assert "user\nSpeak now.<|im_end|>" in template.render(
        messages=[{"role": "user", "content": parts}]
    )


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "No messages"),
        ([{"role": "oracle", "content": "x"}], "Unknown role: oracle"),
        ([corpus.user("x"), {"role": "system", "content": "late"}], "comes first"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "text only"),
        ([{"role": "user", "content": {"text": "x"}}], "string or a list"),
    ],
)
def test_messages_that_cannot_be_drawn_are_refused(template, messages, complaint):
    with pytest.raises(TemplateError, match=complaint):
        template.render(messages=messages)
