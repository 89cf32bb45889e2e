"""Find the characters of the assistant's turns in a rendered conversation, for templates that do not mark them.

A policy generates a turn after the *generation prompt*: the earlier conversation as the template renders it with
add_generation_prompt. So a turn is what the template writes after that prompt when the turn is the last one, up to and
including the end marker:

    <|im_start|>user⏎ hi <|im_end|>⏎ <|im_start|>assistant⏎ | hello <|im_end|> | ⏎ <|im_start|>user⏎ ...
    ---------------- generation prompt -------------------   ---- turn ------   -- what comes between --

Some templates write a turn differently when others follow: Qwen3's drop earlier reasoning, Phi-3's put an EOS after
the last turn only. For these, every turn is kept as it was generated. The text between two turns is taken from the
template, after replacing the content of the turn by a placeholder. If a template writes a conversation the same
whatever follows, the text is exactly the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from megarl.chat.templates import REASONING, ChatTemplate, Message, Span, without_reasoning
from megarl.errors import DataError

_LONGEST_OPENING = 32  # characters that a generation prompt and an answer may both begin with, such as <think>
REMEDY = (
    "set data.chat_template to a file with a template that renders every turn the same whatever follows, or that has "
    "{% generation %} ... {% endgeneration %} around what the assistant generates, or set data.loss_on=all"
)


@dataclass(frozen=True)
class Ending:
    """The text that a template writes after the content of an assistant's turn.

    Attributes:
        last: the whole text, if the turn is the last one.
        marker: the beginning of `last` up to the token at which generation stops; empty if nothing is written.
        between: the marker of a turn that others follow; usually the same.
        opening: the end of the generation prompt, beyond the header of a turn that others follow.
    """

    last: str
    marker: str
    between: str
    opening: str


@dataclass(frozen=True)
class Layout:
    """A conversation as one text.

    Attributes:
        spans: first and last character of each assistant's turn, including its end marker.
        changed: whether the text differs from the template's, because a turn was kept as it was generated.
        shortened: index, from 1, of the first turn of which the template omits some content; or None.
    """

    text: str
    spans: list[Span] = field(default_factory=list)
    changed: bool = False
    shortened: int | None = None


class Turns:
    """Lays out conversations with one template.

    Args:
        tokens: the text of all structural tokens.
        eos: the text of the end of sequence, or "".
    """

    def __init__(self, template: ChatTemplate, tokens: Sequence[str], eos: str) -> None:
        self.template = template
        self.ending = _ending(template, sorted(filter(None, tokens), key=len, reverse=True), eos)

    @property
    def marker(self) -> str:
        """The text that ends a response; empty if there is none."""
        return "" if self.ending is None else self.ending.marker

    def lay_out(self, messages: Sequence[Message]) -> Layout:
        """Lay out a conversation to train on. Raises `DataError` if the assistant's characters cannot be determined."""
        whole = self.template.render(messages)
        text, spans, changed, shortened = self._through_last_answer(messages, whole)
        if not spans or whole.startswith(text):
            return Layout(whole, spans, changed, shortened)
        last = _answers(messages)[-1]
        rest = self._after(messages, last, False) if last + 1 < len(messages) else self._trailing()
        return Layout(text + rest, spans, True, shortened)

    def prompt(self, messages: Sequence[Message]) -> Layout:
        """Lay out a conversation with the generation prompt; earlier turns are as in `lay_out`."""
        published = self.template.render(messages, True)
        text, spans, changed, shortened = self._through_last_answer(messages)
        if not spans or published.startswith(text):
            return Layout(published, spans, changed, shortened)
        return Layout(text + self._after(messages, _answers(messages)[-1], True), spans, True, shortened)

    def marks_beginning(self) -> bool:
        """Whether the template's text before its marks equals the generation prompt."""
        return self.template.render_marked(_talk()[:2])[0].startswith(self.template.render(_talk()[:1], True))

    def marks_ending(self) -> bool:
        """Whether the template's generation marks enclose the end marker of a response."""
        talk = _talk()[:2]
        text, spans = self.template.render_marked(talk)
        end = text.find(self.marker, text.find(_placeholder(1))) + len(self.marker)
        return any(start < end <= stop for start, stop in spans)

    def _through_last_answer(
        self, messages: Sequence[Message], whole: str | None = None
    ) -> tuple[str, list[Span], bool, int | None]:
        """Return the text up to the last response, the responses' spans, and the other fields of `Layout`.

        `whole` is the rendered conversation, if it is available already.
        """
        spans: list[Span] = []
        text, changed, shortened = "", False, None
        pieces: list[str] | None = None
        answers = _answers(messages)
        for number, turn in enumerate(answers):
            through = messages[: turn + 1]
            prompt = self._generation_prompt(through)
            if not number or prompt.startswith(text):
                text = prompt
            else:
                pieces = self._pieces(messages[: answers[-1]], text[: spans[0][0]]) if pieces is None else pieces
                after = self._known_after(pieces, number, prompt)
                text += self._after(messages[:turn], answers[number - 1], True) if after is None else after
                changed = True
            rendered = whole if whole is not None and turn + 1 == len(messages) else self.template.render(through)
            response = self._response(through, prompt, rendered)
            spans.append((len(text), len(text) + len(response)))
            text += response
            if shortened is None and self._is_shortened(through[-1], prompt, response):
                shortened = turn + 1
        return text, spans, changed, shortened

    def _generation_prompt(self, through: Sequence[Message]) -> str:
        """Return the generation prompt of the last message."""
        if len(through) > 1:
            return self.template.render(through[:-1], True)
        try:  # many templates cannot render a conversation of no turns
            return self.template.render([], True)
        except DataError:
            return self._around(through, 0, False)[0]

    def _response(self, through: Sequence[Message], prompt: str, rendered: str) -> str:
        """Return the last message as it is generated after a prompt, with its end marker."""
        generated, published = None, (prompt, rendered)
        for skip in _skips(through):
            if skip:
                prompt, rendered = self._generation_prompt(through[skip:]), self.template.render(through[skip:])
            if rendered.startswith(prompt):
                generated = rendered[len(prompt) :]
                break
        generated = self._as_generated(through, *published) if generated is None else generated
        if self.ending is None or not generated.endswith(self.ending.last):
            return generated.rstrip()
        return generated[: len(generated) - len(self.ending.last)] + self.ending.marker

    def _is_shortened(self, message: Message, prompt: str, response: str) -> bool:
        """Return whether the template omits more of a message than white space and the beginning in the prompt."""
        content = str(message.get("content") or "").lstrip()
        missing = _letters(content) - (_letters(response) - _letters(self.marker))
        if missing <= 0:
            return False
        tail = prompt.rstrip()[-_LONGEST_OPENING:]
        shared = next((tail[at:] for at in range(len(tail)) if content.startswith(tail[at:])), "")
        return missing > _letters(shared)

    def _as_generated(self, through: Sequence[Message], prompt: str, rendered: str) -> str:
        """Return a turn that the template writes differently from how its generation prompt begins it.

        DeepSeek's prompt opens with `<think>`, but the rendered turn has no thinking. The generated text is then the
        turn's own thinking, or none if it has none, and the text that the template writes after it.
        """
        common = _shared(prompt, rendered)
        if not prompt[common:].strip():
            return rendered[common:]
        turn = len(through) - 1
        before, after = self._around(through, turn, False)
        opened = prompt[len(before) :].strip()
        tag = re.fullmatch(r"<(\w+)>", opened)
        if not prompt.startswith(before) or tag is None:
            raise self._unknown(turn)
        content = str(through[turn].get("content") or "").strip()
        closed = f"\n</{tag[1]}>\n\n"
        reasoning = next((through[turn][name] for name in REASONING if through[turn].get(name)), "")
        if content.startswith(opened):
            return content[len(opened) :].lstrip("\n") + after
        return str(reasoning).strip("\n") + closed + content + after

    def _pieces(self, messages: Sequence[Message], first: str) -> list[str]:
        """Return the text around the responses, from one rendering that contains them all; else an empty list.

        It is empty if the text before the first response differs from what it was when that was generated.
        """
        try:
            text = self.template.render(_blanked(messages), True)
        except DataError:
            return []
        pieces = []
        for turn in _answers(messages):
            piece, found, text = text.partition(_placeholder(turn))
            if not found:
                return []
            pieces.append(piece)
        return [*pieces, text] if pieces and _meets(pieces[0], first) else []

    def _known_after(self, pieces: Sequence[str], number: int, prompt: str) -> str | None:
        """Return the text after a response's end marker, if the next generation prompt ends in exactly this text."""
        if self.ending is None or number >= len(pieces):
            return None
        _, marker, after = pieces[number].partition(self.ending.between)
        if self.ending.between and not marker:
            return None
        after = after if self.ending.between else pieces[number]
        return next((one for one in (after, after + self.ending.opening) if one and prompt.endswith(one)), None)

    def _after(self, messages: Sequence[Message], turn: int, add_generation_prompt: bool) -> str:
        """Return the text after the end marker of an assistant's turn that others follow.

        The text before the turn must be the same as when the turn was generated.
        """
        if self.ending is None:
            raise self._unknown(turn)
        for skip in _skips(messages):
            try:
                if skip:
                    return self._plainly_after(messages[skip:], turn - skip, add_generation_prompt)
                before, after = self._around(_blanked(messages), turn, add_generation_prompt)
                prompt = self._generation_prompt(_blanked(messages[: turn + 1]))
                first = self._generation_prompt(_blanked(messages[: _answers(messages)[0] + 1]))
            except DataError:
                continue
            end = after.find(self.ending.between)
            moved = first[_shared(before, first) :]
            if end >= 0 and _meets(before, prompt) and (not moved.strip() or self.ending.opening.endswith(moved)):
                return after[end + len(self.ending.between) :]
        raise self._unknown(turn)

    def _plainly_after(self, messages: Sequence[Message], turn: int, add_generation_prompt: bool) -> str:
        """Return the same text, for templates that write the turn alike whatever follows."""
        through = messages[: turn + 1]
        prompt = self._generation_prompt(through)
        text = prompt + self._response(through, prompt, self.template.render(through))
        whole = self.template.render(messages, add_generation_prompt)
        if not whole.startswith(text):
            raise self._unknown(turn)
        return whole[len(text) :]

    def _around(self, messages: Sequence[Message], turn: int, add_generation_prompt: bool) -> tuple[str, str]:
        """Return the text before and after the content of a turn."""
        marked = [*messages]
        marked[turn] = without_reasoning(messages[turn]) | {"content": _placeholder(turn)}
        pieces = self.template.render(marked, add_generation_prompt).split(_placeholder(turn))
        if len(pieces) != 2:
            raise self._unknown(turn)
        return pieces[0], pieces[1]

    def _trailing(self) -> str:
        return "" if self.ending is None else self.ending.last[len(self.ending.marker) :]

    def _unknown(self, turn: int) -> DataError:
        return DataError(
            f"the chat template does not keep the tokens of turn {turn + 1} (assistant) when the conversation is cut "
            "around it, so they cannot be told from the prompt's; " + REMEDY,
            key="data.chat_template",
            where=f"turn {turn + 1}",
            offers={"data.loss_on": ["all"]},
        )


def _ending(template: ChatTemplate, tokens: Sequence[str], eos: str) -> Ending | None:
    """Render a placeholder conversation to find how a template ends a turn; None if it raises."""
    talk = _talk()
    try:
        last = template.render(talk[:2]).partition(_placeholder(1))[2]
        header, _, rest = template.render(talk, True).partition(_placeholder(1))
        between, prompt = rest.partition(_placeholder(2))[0], template.render(talk[:1], True)
    except DataError:
        return None
    marker = _marker(last, tokens, eos)
    opening = prompt[len(header) :] if prompt.startswith(header) else ""
    return Ending(last, marker, marker if between.startswith(marker) else _marker(between, tokens, eos), opening)


def _talk() -> list[Message]:
    return [{"role": role, "content": _placeholder(at)} for at, role in enumerate(("user", "assistant", "user"))]


def _marker(text: str, tokens: Sequence[str], eos: str) -> str:
    """Return a text up to its first structural token, or up to EOS if only such tokens precede it."""
    starts = [(text.find(token), -len(token)) for token in tokens if token in text]
    if not starts:
        return text.rstrip()
    start, size = min(starts)
    end = run = start - size
    while not text.startswith(eos, run - len(eos)) or not eos:
        following = next((token for token in tokens if text.startswith(token, run)), None)
        if following is None:
            return text[:end]
        run += len(following)
    return text[:run]


def _meets(before: str, prompt: str) -> bool:
    """Return whether the text before a turn is its generation prompt, except for how the turn itself begins."""
    common = _shared(before, prompt)
    return len(before) == common or not prompt[common:].strip()


def _shared(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _blanked(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose assistant's turns contain a placeholder and no reasoning."""
    return [
        without_reasoning(message) | {"content": _placeholder(turn)} if message["role"] == "assistant" else message
        for turn, message in enumerate(messages)
    ]


def _skips(messages: Sequence[Message]) -> tuple[int, ...]:
    """Return the numbers of leading messages to try to omit: none, then the system message.

    Mistral's templates move the system message to the last user's turn. Here it stays with the first turn, so later
    text of such a template is rendered without it.
    """
    first = next((at for at, message in enumerate(messages) if message["role"] != "system"), 0)
    return (0, first) if first else (0,)


def _answers(messages: Sequence[Message]) -> list[int]:
    return [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]


def _placeholder(turn: int) -> str:
    """Return plain letters, which no template treats specially and no user writes."""
    return f"megarlturn{turn}x7q3vplaceholder"


def _letters(text: str) -> int:
    """Return the number of characters that are not white space, as templates trim that."""
    return len("".join(text.split()))
