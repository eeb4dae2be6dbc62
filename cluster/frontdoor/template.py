"""Chat templates: a conversation to the text of a prompt, as transformers renders it."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workers.errors import CheckpointError, FieldViolation, InvalidRequestError


class ChatTemplate:
    """A checkpoint's chat template, rendered in a sandbox: it is text from the model's author."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is damaged: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        enable_thinking: bool | None = None,
    ) -> str:
        """Return the prompt of a conversation, up to where the assistant goes on.

        Args:
            messages: In the Hugging Face form: role, content, reasoning_content, tool_calls.
            tools: In the OpenAI form: {"type": "function", "function": {...}}.
            enable_thinking: None leaves it to the template.

        Raises:
            InvalidRequestError: The template refuses the conversation.
        """
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            return self._template.render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=True,
                **thinking,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            violation = FieldViolation("messages", f"the chat template refuses them: {error}")
            raise InvalidRequestError(violation) from error


def starts_in_reasoning(prompt: str) -> bool:
    """Return whether the prompt leaves the assistant inside its reasoning."""
    return prompt.rstrip().endswith("<think>")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does: jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
