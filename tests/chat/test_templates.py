"""The environment of chat templates, and the marks of generation in them."""

import pytest

from megarl.chat.templates import ChatTemplate
from megarl.errors import DataError
from tests.chat import templates
from tests.chat.templates import chat
from tests.refusals import refused

TALK = chat("u:one", "a:two", "u:three", "a:four")


def marked(source: str) -> list[str]:
    text, spans = ChatTemplate(source, {}).render_marked(TALK)
    assert text == ChatTemplate(source, {}).render(TALK)
    return [text[start:end] for start, end in spans]


def test_marks_name_the_characters_between_them() -> None:
    assert ChatTemplate(templates.MARKED, {}).marked
    assert not ChatTemplate(templates.CHATML, {}).marked
    assert marked(templates.MARKED) == ["two<|im_end|>", "four<|im_end|>"]


@pytest.mark.parametrize(
    "source",
    [
        templates.MARKED.replace("{% generation %}", "{%- generation -%}").replace("{% endgen", "{%+ endgen"),
        # Inside of a macro and of a block that is kept for later, where what was rendered before is not known.
        "{% macro say(m) %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ say(m) }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "{% set all %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% endset %}> {{ all }}",
    ],
)
def test_marks_may_stand_anywhere(source: str) -> None:
    assert marked(source) == ["two<|im_end|>", "four<|im_end|>"]


def test_a_marked_template_renders_for_generation() -> None:
    prompt = ChatTemplate(templates.MARKED, {}).render(TALK[:3], True)
    assert prompt == ChatTemplate(templates.CHATML, {}).render(TALK[:3], True)


def test_a_record_cannot_forge_a_mark() -> None:
    with refused(DataError, where="turn 1", names=("U+FDD0",)):
        ChatTemplate(templates.MARKED, {}).render_marked(chat("u:\ufdd0x\ufdd1", "a:y"))


@pytest.mark.parametrize(
    "source",
    [
        "'a' * 10 ** 10",
        "10 ** 10 * [1]",
        "7 ** 10000000",
        "'%10000000000d' % 1",
        "'%*d' % (10 ** 10, 1)",
        "'a'.ljust(10 ** 10)",
        "'a'.center(10 ** 10)",
        "'a' | center(10 ** 10)",
        "'a' | indent(10 ** 10)",
        "'%10000000000d' | format(1)",
        "'{:>10000000000}'.format(1)",
    ],
)
def test_a_template_cannot_fill_the_memory_in_one_step(source: str) -> None:
    with refused(DataError, key="data.chat_template", names=("TemplateError",)):
        ChatTemplate(f"{{{{ {source} }}}}", {}).render(TALK)


def test_operations_of_a_usual_size_are_a_template_s_own() -> None:
    source = "{{ '-' * 20 }}{{ 2 ** 10 }}{{ '%5d|%s%%' % (1, 'x') }}{{ 7 % 3 }}{{ 1.5 * 2 }}{{ 'a'.ljust(3) }}"
    source += "{% macro f(v) %}{{ v }}{% endmacro %}{{ f(1700000000) }}{{ 'b' | indent(2) }}{{ '{:>3}'.format('c') }}"
    assert ChatTemplate(source, {}).render(TALK) == "-" * 20 + "1024    1|x%13.0a  1700000000b  c"


def test_the_date_is_the_same_on_every_day() -> None:
    assert "26 Jul 2024" in ChatTemplate(templates.DATED, {"bos_token": ""}).render(TALK)


def test_templates_find_what_transformers_gives_them() -> None:
    source = (
        "{% if tools is not none or documents is not none %}never{% endif %}"
        "{% for m in messages %}{% if m.skip is defined %}{% continue %}{% endif %}"
        "{{ m.content | tojson }}{% if m.tool_calls is defined %}never{% endif %}{{ m.reasoning_content }}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "<é>", "tool_calls": None, "thinking": "why"},
        {"role": "user", "content": "", "skip": True},
    ]
    assert ChatTemplate(source, {}).render(messages) == '"<é>"why'


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_what_a_template_may_not_do_is_one_line(source: str, kind: str) -> None:
    with refused(DataError, key="data.chat_template", names=("user, assistant, user, assistant", kind)):
        ChatTemplate(source, {}).render(TALK)
