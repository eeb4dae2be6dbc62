"""Reasoning, content and tool calls, told apart while the text arrives.

The format is Qwen3.5's (reference: its chat template, and vLLM's parser of the same model):

    reasoning </think> content <tool_call>
    <function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>

A `<tool_call>` inside the reasoning ends it; `<function=` also begins a call without it. A call
that does not keep to the format is content, as it stands. Nothing is released that may still be the
beginning of a marker.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cluster.frontdoor.tokenizer import held_back

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_BROKEN_OFF = re.compile(r"</function>\s*</tool_call>")
_LONGEST_AWAITED = len(_END_PARAMETER) - 1  # of a tag that is not whole yet
_NAME = re.compile(r"[^<>\n]*")
_NEWLINES = "\n\r"
_JSON_TYPES: Mapping[type, frozenset[str]] = {
    type(None): frozenset({"null"}),
    bool: frozenset({"boolean"}),
    int: frozenset({"integer", "number"}),
    float: frozenset({"number"}),
    str: frozenset(),
    list: frozenset({"array"}),
    dict: frozenset({"object"}),
}


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A complete tool call; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(slots=True)
class Delta:
    """What one piece of text added."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ParsedCall] = field(default_factory=list)


class _State(Enum):
    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"


class OutputParser:
    """Parses one sequence of a chat.

    Args:
        in_reasoning: Whether the prompt left the assistant inside its reasoning.
        tools: The argument schema of each tool offered; without tools, calls are plain content.
    """

    def __init__(self, *, in_reasoning: bool, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._tools = tools
        self._state = _State.REASONING if in_reasoning else _State.CONTENT
        self._may_open = in_reasoning
        self._may_close = False
        self._text = ""  # not yet told apart
        self._at_boundary = in_reasoning  # newlines that come next belong to the format
        self._newlines = ""  # held back: they may precede a marker
        self._awaited: tuple[str, ...] = ()  # without one of these in what is new, a call is open
        self._searched = 0  # how far the text has been searched for them
        self.num_calls = 0

    def push(self, text: str) -> Delta:
        """Return what became certain with this text."""
        self._text += text
        delta = Delta()
        while self._step(delta):
            pass
        return delta

    def finish(self) -> Delta:
        """Return what was held back: nothing follows."""
        delta = Delta()
        self._release(self._text, delta)
        if self._state is not _State.REASONING:
            delta.content += self._newlines
        self._text = self._newlines = ""
        return delta

    def _step(self, delta: Delta) -> bool:
        """Go on to the next marker; says whether there is more to tell apart."""
        match self._state:
            case _State.REASONING:
                return self._reason(delta)
            case _State.CONTENT:
                return self._read_content(delta)
            case _State.CALL:
                return self._read_call(delta)

    def _reason(self, delta: Delta) -> bool:
        markers = (_END_THINK, _CALL) if self._tools else (_END_THINK,)
        if self._may_open:  # a template that does not open the reasoning itself
            start = self._text.lstrip(_NEWLINES)
            if start != _THINK and _THINK.startswith(start):
                return False
            self._may_open = False
            self._text = start.removeprefix(_THINK)
        marker = self._release_up_to(markers, delta)
        if marker is None:
            return False
        self._newlines, self._at_boundary = "", True
        self._state = _State.CONTENT
        if marker == _END_THINK:
            self._text = self._text.removeprefix(_END_THINK)
        return True

    def _read_content(self, delta: Delta) -> bool:
        if self._may_close:  # the closing tag of a call that is complete
            start = self._text.lstrip()
            if start != _END_CALL and _END_CALL.startswith(start):
                return False
            self._may_close = False
            if start.startswith(_END_CALL):
                self._text = start.removeprefix(_END_CALL)
        if not self._tools:
            self._release(self._text, delta)
            self._text = ""
            return False
        if self._release_up_to((_CALL, _FUNCTION), delta) is None:
            return False
        self._state = _State.CALL
        return True

    def _read_call(self, delta: Delta) -> bool:
        if self._awaited:
            if all(self._text.find(tag, self._searched) < 0 for tag in self._awaited):
                self._searched = len(self._text) - _LONGEST_AWAITED
                return False
            self._awaited = ()
        try:
            call = _CallReader(self._text).read()
        except _IncompleteError as error:
            self._awaited, self._searched = error.awaited, len(self._text) - _LONGEST_AWAITED
            return False
        except _MalformedError:  # its marker is content, and what follows is looked at anew
            marker = _CALL if self._text.startswith(_CALL) else _FUNCTION
            self._state = _State.CONTENT
            self._release(marker, delta)
            self._text = self._text[len(marker) :]
            return True
        self._state = _State.CONTENT
        self._newlines, self._at_boundary, self._may_close = "", True, True
        self._text = self._text[call.end :]
        self.num_calls += 1
        arguments = typed_arguments(call.values, self._tools.get(call.name, {}))
        delta.tool_calls.append(ParsedCall(call.name, json.dumps(arguments, ensure_ascii=False)))
        return True

    def _release_up_to(self, markers: Sequence[str], delta: Delta) -> str | None:
        """Release the text before the first marker; return it, or None when there is none."""
        found = [(start, m) for m in markers if (start := self._text.find(m)) >= 0]
        cut = min(found)[0] if found else len(self._text) - held_back(self._text, markers)
        self._release(self._text[:cut], delta)
        self._text = self._text[cut:]
        return min(found)[1] if found else None

    def _release(self, text: str, delta: Delta) -> None:
        """Hand out text, without the newlines that belong to the format."""
        if self._at_boundary:
            text = text.lstrip(_NEWLINES)
        if not text:
            return
        self._at_boundary = False
        text = self._newlines + text
        body = text.rstrip(_NEWLINES)
        self._newlines = text[len(body) :]
        if self._state is _State.REASONING:
            delta.reasoning += body
        else:
            delta.content += body


class _MalformedError(Exception):
    """The text does not keep to the format of a call."""


class _IncompleteError(Exception):
    """The text may become a call; not before one of the awaited tags comes, if any is named."""

    def __init__(self, *awaited: str) -> None:
        super().__init__()
        self.awaited = awaited


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    values: dict[str, str]
    end: int  # where the text goes on


class _CallReader:
    """Reads the call with which a text begins."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> _Call:
        """Return the call, or raise what is wrong with it."""
        if self._expect(_CALL, _FUNCTION) == _CALL:
            self._expect(_FUNCTION)
        name, values = self._name(), {}
        while self._expect(_PARAMETER, _END_FUNCTION) == _PARAMETER:
            key = self._name()
            values[key] = self._value()
        return _Call(name, values, self._at)

    def _expect(self, *tags: str) -> str:
        rest = self._text[self._at :].lstrip()
        for tag in tags:
            if rest.startswith(tag):
                self._at = len(self._text) - len(rest) + len(tag)
                return tag
        if any(tag.startswith(rest) for tag in tags):
            raise _IncompleteError
        raise _MalformedError

    def _name(self) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            raise _MalformedError
        if match.end() == len(self._text):
            raise _IncompleteError
        if self._text[match.end()] != ">" or not match[0]:
            raise _MalformedError
        self._at = match.end() + 1
        return match[0]

    def _value(self) -> str:
        """Read up to a closing tag that another parameter or the function's end follows."""
        start = end = self._at
        broken = _BROKEN_OFF.search(self._text, start)
        while True:
            end = self._text.find(_END_PARAMETER, end)
            if broken and (end < 0 or broken.end() <= end):
                raise _MalformedError
            if end < 0:  # a long value is not read again with every token
                raise _IncompleteError(_END_PARAMETER, _END_CALL)
            self._at = end + len(_END_PARAMETER)
            after = self._text[self._at :].lstrip()
            if after.startswith((_PARAMETER, _END_FUNCTION)):
                return self._text[start:end].removeprefix("\n").removesuffix("\n")
            if _PARAMETER.startswith(after) or _END_FUNCTION.startswith(after):
                raise _IncompleteError
            end = self._at


def typed_arguments(values: Mapping[str, str], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with the types that the tool's JSON schema gives them.

    A value that does not fit its type, or of which the schema says nothing, stays text.
    """
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    return {key: _typed(value, _types_of(known.get(key))) for key, value in values.items()}


def _types_of(schema: object) -> frozenset[str]:
    """Return the JSON types that a schema allows; none when it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type")
    types = {t for t in (named if isinstance(named, list) else [named]) if isinstance(t, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list) else []:
            types |= _types_of(option)
    return frozenset(types)


def _typed(text: str, types: frozenset[str]) -> object:
    """Return the value that the text writes, if it is of an allowed type other than text."""
    if not types - {"string"}:
        return text
    plain = text.strip()
    try:
        value = json.loads(plain.lower() if plain.lower() in {"true", "false", "null"} else plain)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # it can be written back
    except (ValueError, RecursionError):
        return text
    return value if _JSON_TYPES[type(value)] & types else text
