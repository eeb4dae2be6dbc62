"""Chat templates: what they see, and what they cannot do."""

from datetime import UTC, datetime

import pytest

from cluster.frontdoor.template import ChatTemplate, starts_in_reasoning
from workers.errors import CheckpointError, InvalidRequestError


def test_templates_see_the_date_and_the_control_tokens():
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }}{{ eos_token }}"
        "{% for m in messages %}{% break %}{% endfor %}",
        {"eos_token": "<end>"},
        now=lambda: datetime(2026, 3, 1, tzinfo=UTC),
    )
    assert template.render([{"role": "user", "content": ""}]) == "01 Mar 2026<end>"


def test_a_template_cannot_reach_out_of_its_sandbox():
    template = ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", {})
    with pytest.raises(InvalidRequestError):
        template.render([])


def test_a_damaged_template_is_refused_when_it_is_read():
    with pytest.raises(CheckpointError, match="damaged"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("assistant\n<think>\n", True),
        ("assistant\n<think>\n\n</think>\n\n", False),
        ("assistant\n", False),
    ],
)
def test_whether_the_answer_starts_in_reasoning_is_read_off_the_prompt(prompt, expected):
    assert starts_in_reasoning(prompt) is expected
