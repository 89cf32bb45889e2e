"""Which characters of a conversation are the assistant's, for every structure that published templates have."""

import pytest

from megarl.chat.templates import ChatTemplate, Message
from megarl.chat.turns import Turns
from megarl.errors import DataError
from tests.chat import templates
from tests.chat.templates import chat
from tests.refusals import refused

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
STABLE = {
    "ChatML": templates.CHATML,
    "dated": templates.DATED,
    "asks always": templates.ALWAYS_ASKS,
    "EOS at the end": templates.EOS_AT_THE_END,
    "no end": templates.NO_END,
}
UNSTABLE = {
    "last thinks": templates.LAST_THINKS,
    "opens thinking": templates.OPENS_THINKING,
    "system last": templates.SYSTEM_LAST,
    "other last end": templates.OTHER_LAST_END,
}
TALK = chat("u:one", "a: two", "u:three", "a:four")


def turns(source: str) -> Turns:
    return Turns(ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}), TOKENS, "</s>")


def shown(known: Turns, messages: list[Message]) -> str:
    """A layout with brackets around the assistant's characters."""
    layout, at, text = known.lay_out(messages), 0, ""
    for start, end in layout.spans:
        text += layout.text[at:start] + "⟦" + layout.text[start:end] + "⟧"
        at = end
    return text + layout.text[at:]


@pytest.mark.parametrize("name", STABLE)
def test_a_template_that_is_the_same_whatever_follows_is_kept_to_the_letter(name: str) -> None:
    known = turns(STABLE[name])
    for length in (2, 3, 4):
        layout = known.lay_out(TALK[:length])
        assert layout.text == known.template.render(TALK[:length])
        assert len(layout.spans) == length // 2
        assert not layout.changed


@pytest.mark.parametrize("name", STABLE | UNSTABLE)
def test_training_goes_on_from_what_generation_starts_with(name: str) -> None:
    known = turns((STABLE | UNSTABLE)[name])
    talk = [*TALK, *chat("u:five", "a:<think>\nwhy\n</think>\n\nsix", "u:seven")]
    layout = known.lay_out(talk)
    for turn, (start, _) in zip((1, 3, 5), layout.spans, strict=True):
        assert known.prompt(talk[:turn]).text == layout.text[:start]
    assert known.prompt(talk).text.startswith(layout.text.removesuffix("</s>").removesuffix("<|im_start|>assistant\n"))


@pytest.mark.parametrize("name", STABLE | UNSTABLE)
def test_a_prompt_without_answers_is_the_templates_own(name: str) -> None:
    known = turns((STABLE | UNSTABLE)[name])
    messages = chat("u:one")
    assert known.prompt(messages).text == known.template.render(messages, True)


def test_an_answer_keeps_the_thinking_it_was_generated_with() -> None:
    talk = chat("u:q", "a:<think>\nwhy\n</think>\n\none", "u:r", "a:two")
    assert shown(turns(templates.LAST_THINKS), talk) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<think>\nwhy\n</think>\n\none<|im_end|>⟧\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\ntwo<|im_end|>⟧\n"
    )


def test_thinking_that_the_prompt_opens_is_closed_in_the_answer() -> None:
    talk = chat("u:q", "a:<think>\nwhy\n</think>\n\none", "u:r", "a:two")
    assert shown(turns(templates.OPENS_THINKING), talk) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n⟦why\n</think>\n\none<|im_end|>⟧\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>\n\ntwo<|im_end|>⟧\n"
    )


def test_reasoning_beside_the_content_is_what_the_answer_thinks() -> None:
    talk = [*chat("u:q"), {"role": "assistant", "content": "one", "reasoning_content": "why"}]
    assert "<think>\n⟦why\n</think>\n\none<|im_end|>⟧" in shown(turns(templates.OPENS_THINKING), talk)


def test_a_system_message_that_moves_stays_with_the_first_turn() -> None:
    talk = chat("s:Be brief.", "u:one", "a:two ", "u:three", "a:four")
    assert shown(turns(templates.SYSTEM_LAST), talk) == (
        "<s>[INST] Be brief.\n\none[/INST]⟦ two</s>⟧[INST] three[/INST]⟦ four</s>⟧"
    )
    prompt = turns(templates.SYSTEM_LAST).prompt(talk[:4]).text
    assert prompt == "<s>[INST] Be brief.\n\none[/INST] two</s>[INST] three[/INST]"


def test_every_answer_ends_as_the_last_one_does() -> None:
    assert shown(turns(templates.OTHER_LAST_END), TALK) == (
        "<|im_start|>user\none<|im_end|><|im_start|>assistant\n⟦ two</s>⟧"
        "<|im_start|>user\nthree<|im_end|><|im_start|>assistant\n⟦four</s>⟧"
    )


@pytest.mark.parametrize(
    ("source", "marker"),
    [
        (templates.CHATML, "<|im_end|>"),
        (templates.ALWAYS_ASKS, "<|im_end|>"),
        (templates.EOS_AT_THE_END, "<|im_end|>"),
        (templates.SYSTEM_LAST, "</s>"),
        (templates.NO_END, ""),
        (templates.CHATML.replace("<|im_end|>", "<|im_end|></s>"), "<|im_end|></s>"),
        (templates.CHATML.replace("<|im_end|>", " [end]"), " [end]"),
    ],
)
def test_an_answer_ends_at_the_token_where_generation_stops(source: str, marker: str) -> None:
    assert turns(source).marker == marker


def test_a_dialogue_may_begin_with_an_answer() -> None:
    source = "{{ messages[0].role[:0] }}" + templates.CHATML  # fails on a conversation of no turns
    assert shown(turns(source), chat("a:hello", "u:hi")) == (
        "<|im_start|>assistant\n⟦hello<|im_end|>⟧\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_content_that_a_template_leaves_out_is_told_of() -> None:
    source = templates.CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    thought = chat("u:one", "a:two", "u:three", "a:<think>why</think>four")
    assert turns(source).lay_out(thought).shortened == 4
    assert turns(source).lay_out(TALK).shortened is None
    assert turns(templates.LAST_THINKS).lay_out(thought).shortened is None
    assert turns(templates.OPENS_THINKING).lay_out(thought).shortened is None


@pytest.mark.parametrize(
    ("source", "turn"),
    [
        # The whole conversation is counted in every turn: nothing stays where it was.
        ("{% for m in messages %}{{ m.content }}{{ messages|length }}{% endfor %}", 2),
        # Earlier users' turns vanish along with the answers.
        ("{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}", 2),
    ],
)
def test_a_turn_that_cannot_be_told_is_named_with_what_to_do(source: str, turn: int) -> None:
    with refused(DataError, key="data.chat_template", where=f"turn {turn}", offers={"data.loss_on": ["all"]}):
        turns(source).lay_out(TALK)


def test_roles_in_a_wrong_order_are_told_in_the_templates_own_words() -> None:
    with refused(DataError, key="data.chat_template", offers={}, names=("roles must alternate",)):
        turns(templates.SYSTEM_LAST).lay_out(chat("u:a", "u:b", "a:c"))


def test_a_call_of_a_tool_belongs_to_the_answer() -> None:
    source = templates.LAST_THINKS.replace(
        "<|im_end|>\n{% endfor %}", "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "<add>"}]}
    talk = [*chat("u:1+1"), call, {"role": "tool", "content": "2"}, *chat("a:two")]
    text = shown(turns(source), talk)
    assert '⟦<think>\n\n</think>\n\n[{"name": "<add>"}]<|im_end|>⟧\n<|im_start|>tool\n2<|im_end|>\n' in text
    assert text.endswith("⟦<think>\n\n</think>\n\ntwo<|im_end|>⟧\n")
