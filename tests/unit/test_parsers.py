"""Reasoning, content and tool calls, told apart in whatever pieces the text comes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.frontdoor.parsers import OutputParser, typed_arguments

TOOLS = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "save": {},
}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
PARSED = ("weather", {"city": "Zürich", "days": 3})


def parse(text, sizes=(1,), *, in_reasoning=True, tools=TOOLS):
    """Return (reasoning, content, calls) of a text that comes in pieces of the given sizes."""
    parser = OutputParser(in_reasoning=in_reasoning, tools=tools)
    deltas, start, turn = [], 0, 0
    while start < len(text):
        size = sizes[turn % len(sizes)]
        deltas.append(parser.push(text[start : start + size]))
        start, turn = start + size, turn + 1
    deltas.append(parser.finish())
    calls = [(c.name, json.loads(c.arguments)) for d in deltas for c in d.tool_calls]
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas), calls


CASES = {
    "reasoning, then content": ("I think.\n</think>\n\nYes.", ("I think.", "Yes.", [])),
    "reasoning that never ends": ("I think\n\nand think\n", ("I think\n\nand think", "", [])),
    "no reasoning at all": ("</think>\n\nYes.\n", ("", "Yes.\n", [])),
    "a template that leaves opening to the model": ("<think>\nHm.\n</think>\nA", ("Hm.", "A", [])),
    "a call": (f"Look.\n</think>\n\n{CALL}", ("Look.", "", [PARSED])),
    "content before a call": (f"</think>\n\nOne moment.\n\n{CALL}", ("", "One moment.", [PARSED])),
    "two calls": (f"</think>\n\n{CALL}\n{CALL}\n", ("", "", [PARSED, PARSED])),
    "a call ends the reasoning": (f"I must call.\n{CALL}", ("I must call.", "", [PARSED])),
    "content after a call": (f"</think>{CALL}\n\nDone.", ("", "Done.", [PARSED])),
    "a call without its opening tag": (
        f"</think>A\n{CALL.removeprefix('<tool_call>')}",
        ("", "A", [PARSED]),
    ),
    "a call without its closing tag": (
        f"</think>{CALL.removesuffix('</tool_call>')}",
        ("", "", [PARSED]),
    ),
    "a call without parameters": (
        "</think><tool_call>\n<function=save>\n</function>\n</tool_call>",
        ("", "", [("save", {})]),
    ),
    "an unknown function keeps text": (
        "</think><tool_call><function=fly><parameter=to>7</parameter></function></tool_call>",
        ("", "", [("fly", {"to": "7"})]),
    ),
    "one newline of each end is trimmed": (
        "</think><function=save><parameter=text>\n\n  a\n\n</parameter></function>",
        ("", "", [("save", {"text": "\n  a\n"})]),
    ),
    "tags inside a value": (
        "</think><function=save><parameter=text>\n</tool_call> </parameter> <tool_call>\n"
        "</parameter>\n</function>\n</tool_call>!",
        ("", "!", [("save", {"text": "</tool_call> </parameter> <tool_call>"})]),
    ),
    "a broken call is content": (
        "</think><tool_call>\n<function=weather>\n<parameter=city>\nRome\n</function>\n</tool_call>",
        (
            "",
            "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</function>\n</tool_call>",
            [],
        ),
    ),
    "a call in another form is content": (
        '</think><tool_call>{"name": "weather"}</tool_call>',
        ("", '<tool_call>{"name": "weather"}</tool_call>', []),
    ),
    "a good call after a broken one": (
        f"</think><tool_call>oops</tool_call>\n{CALL}",
        ("", "<tool_call>oops</tool_call>", [PARSED]),
    ),
    "a call that is cut off is content": (
        "</think>Hm.\n<tool_call>\n<function=weather>\n<parameter=city>\nRo",
        ("", "Hm.\n<tool_call>\n<function=weather>\n<parameter=city>\nRo", []),
    ),
    "a marker that is cut off is content": ("</think>1 <tool_c", ("", "1 <tool_c", [])),
    "a name that is cut off is content": ("</think><function=we", ("", "<function=we", [])),
    "less-than signs are no markers": ("a < b </ c\n</think>d < e", ("a < b </ c", "d < e", [])),
}


@pytest.mark.parametrize("sizes", [(1,), (2, 5), (1000,)], ids=["1", "2-5", "all"])
@pytest.mark.parametrize("case", CASES)
def test_output_is_told_apart(case, sizes):
    text, expected = CASES[case]
    assert parse(text, sizes) == expected


def test_without_thinking_the_output_starts_as_content():
    assert parse("\nYes.\n", in_reasoning=False) == ("", "\nYes.\n", [])


def test_without_tools_a_call_is_content():
    assert parse(CALL, in_reasoning=False, tools={}) == ("", CALL, [])
    assert parse(f"a {CALL}", tools={}) == (f"a {CALL}", "", [])


def test_half_a_marker_is_held_back_until_it_is_decided():
    parser = OutputParser(in_reasoning=True, tools=TOOLS)
    assert parser.push("so </thi").reasoning == "so "
    assert parser.push("s").reasoning == "</this"
    assert parser.push(" </think>\n\nA <too").content == "A "
    assert parser.push("l <").content == "<tool "


def test_a_call_is_handed_out_as_soon_as_its_function_ends():
    parser = OutputParser(in_reasoning=False, tools=TOOLS)
    *before, after = CALL.partition("</function>")
    assert [c.name for c in parser.push("".join(before)).tool_calls] == ["weather"]
    assert parser.push(after).content == ""


PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "save>",
    "</function>",
]
PIECES += ["<parameter=", "k>", "</parameter>", "\n", "a", "<", " ", CALL]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=14),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    in_reasoning=st.booleans(),
)
def test_the_pieces_in_which_text_comes_make_no_difference(pieces, sizes, in_reasoning):
    text = "".join(pieces)
    assert parse(text, sizes, in_reasoning=in_reasoning) == parse(
        text, (len(text) + 1,), in_reasoning=in_reasoning
    )


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("3", {"type": "integer"}, 3),
        ("3", {"type": "string"}, "3"),
        ("3", {}, "3"),
        ("3.5", {"type": "number"}, 3.5),
        ("3", {"type": "number"}, 3),
        ("3.5", {"type": "integer"}, "3.5"),
        ("True", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, "yes"),
        ("null", {"type": ["string", "null"]}, None),
        ("none", {"type": ["string", "null"]}, "none"),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("[1, 2", {"type": "array"}, "[1, 2"),
        ("5", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 5),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ('["\\ud800"]', {"type": "array"}, '["\\ud800"]'),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("3", {"type": 7, "anyOf": 1}, "3"),
        ("3", True, "3"),
    ],
)
def test_values_have_the_type_of_the_schema_or_stay_text(text, schema, value):
    arguments = typed_arguments({"k": text}, {"properties": {"k": schema}})
    assert arguments == {"k": value}
    assert type(arguments["k"]) is type(value)
