"""What every tokenizer can do: text to token ids and back, chats, and the files it leaves beside a model."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from megarl.chat.cutting import Anchor, encode_cut
from megarl.chat.notices import note_layout, tell
from megarl.chat.templates import ChatTemplate, Message, check_messages
from megarl.chat.turns import Layout, Turns
from megarl.disk import UnreadableError, parse_object, read_text
from megarl.errors import ConfigError, DataError

ROLES = ("system", "user", "assistant")
MARKER_FILE = "megarl_tokenizer.json"


class Tokenizer(ABC):
    """What the rest of megarl may ask of a tokenizer.

    Attributes:
        size: entries of the vocabulary; every id is below it.
        eos_id: the token with which a response ends.
        pad_id: fills the right of a batch; may equal `eos_id`, so masks are never derived from it.
        bos_id: the token that opens a text, where the vocabulary has one.
        adds_bos: whether a text of this tokenizer is meant to start with `bos_id`.
    """

    kind: ClassVar[str]
    size: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None
    adds_bos: bool = False
    ends_prompts: bool = False
    """Whether prompts end with EOS, as an encoder reads them."""
    _known: Mapping[str, Turns] = MappingProxyType({})  # by the template's source

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text; nothing is put before or after it."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens and ids beyond the vocabulary are left out."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write everything that `load_tokenizer` needs into a folder, which is made if missing."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that two tokenizers share only if they turn all texts into the same ids."""

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Tokens that stand for structure rather than text, by their written form."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that opens a sequence: with `bos_id` first, where the tokenizer adds one, and with EOS at
        the end, where an encoder reads it."""
        return self.end_prompt(self.encode_opening(text))

    def encode_opening(self, text: str) -> list[int]:
        """Token ids of a text that opens a sequence, of which a prompt may be the beginning."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None else ids

    def end_prompt(self, prompt: list[int]) -> list[int]:
        """Return the tokens of a prompt with the EOS that an encoder reads."""
        return [*prompt, self.eos_id] if self.ends_prompts and prompt[-1:] != [self.eos_id] else prompt

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, template: str | None = None
    ) -> list[int]:
        """Token ids of a conversation as the template writes it.

        Args:
            messages: turns with a "role" and a "content".
            add_generation_prompt: end with what precedes an answer of the assistant.
            template: Jinja template; None takes the tokenizer's own, or the built-in one if it has none.
        """
        check_messages(messages)
        turns = self._turns(template)
        if turns is None:
            return self._encode_built_in(messages, add_generation_prompt)[0]
        return self._encode_markup(turns.template.render(messages, add_generation_prompt))

    def encode_chat(self, messages: Sequence[Message], template: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids of a conversation to train on, and a 0/1 list of the same length that marks the assistant's turns.

        A turn spans from the end of the generation prompt to its own end marker, included, or over what the template
        has between `{% generation %}` and `{% endgeneration %}`. The tokens before a turn are those of
        `encode_chat_prompt`. A template for which turns cannot be told raises `DataError`.

        Where an encoder reads prompts, only the last turn is marked, as all before it is its prompt.
        """
        tokens, marks = self._encode_chat(messages, template)
        if not self.ends_prompts or 1 not in marks:
            return tokens, marks
        start = last_turn(marks)
        prompt = self.end_prompt(tokens[:start])
        return prompt + tokens[start:], [0] * len(prompt) + marks[start:]

    def _encode_chat(self, messages: Sequence[Message], template: str | None) -> tuple[list[int], list[int]]:
        check_messages(messages)
        turns = self._turns(template)
        if turns is None:
            return self._encode_built_in(messages, False)
        if turns.template.marked:
            layout = Layout(*turns.template.render_marked(messages))
        else:
            layout = note_layout(turns.lay_out(messages))
        tokens, cuts = encode_cut(self._encode_anchored, layout.text, list(chain.from_iterable(layout.spans)))
        chosen = [0] * len(tokens)
        for start, end in zip(cuts[::2], cuts[1::2], strict=True):
            chosen[start:end] = [1] * (end - start)
        return tokens, chosen

    def encode_answered(self, messages: Sequence[Message], template: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids and marks of `encode_chat` for a conversation whose last message is an answer, up to its end.

        Nothing generates what the template writes after the answer's last token, so it is left out.
        """
        tokens, marks = self.encode_chat(messages, template)
        turns, end = self._turns(template), self.stop_ids(template)[-1]
        if turns is None:
            return tokens, marks
        last = max((place for place, mark in enumerate(marks) if mark), default=len(tokens) - 1)
        if self._ends(turns):  # which marks of the template may leave out, or be followed by
            last = next((place for place in range(last_turn(marks), len(tokens)) if tokens[place] == end), last)
        return tokens[: last + 1], marks[: last + 1]

    def answer_end(self, template: str | None = None) -> tuple[int, ...]:
        """Tokens that a template writes after the content of an answer, up to the one at which generation stops; none
        if it writes nothing."""
        turns = self._turns(template)
        return (self.eos_id,) if turns is None else tuple(self._encode_markup(turns.marker)) if turns.marker else ()

    def template_in_use(self, template: str | None = None) -> str | None:
        """The source of the template that lays out conversations; None for the built-in one."""
        return self._own_template() if template is None else template

    def encode_chat_prompt(self, messages: Sequence[Message], template: str | None = None) -> list[int]:
        """Token ids of a conversation to be answered, in which earlier answers stand as `encode_chat` has them."""
        return self.end_prompt(self._encode_chat_prompt(messages, template))

    def _encode_chat_prompt(self, messages: Sequence[Message], template: str | None) -> list[int]:
        check_messages(messages)
        turns = self._turns(template)
        if turns is None:
            return self._encode_built_in(messages, True)[0]
        if turns.template.marked:
            layout = Layout(*turns.template.render_marked(messages, True))
        else:
            try:
                layout = note_layout(turns.prompt(messages))
            except DataError:  # no conversation like this can be trained on, so no other rendering must be met
                layout = Layout(turns.template.render(messages, True))
        return encode_cut(self._encode_anchored, layout.text, list(chain.from_iterable(layout.spans)))[0]

    def stop_ids(self, template: str | None = None) -> tuple[int, ...]:
        """Tokens at which a response ends: EOS, and the one with which the chat template ends an answer."""
        turns = self._turns(template)
        written = None if turns is None else self._ends(turns)
        return tuple(dict.fromkeys((self.eos_id, self.eos_id if written is None else self._structural[written])))

    def _ends(self, turns: Turns) -> str | None:
        """The token of structure with which a template ends an answer, by its written form; None if there is none."""
        return next((text for text in self._structural if turns.marker.endswith(text)), None)

    def _turns(self, template: str | None) -> Turns | None:
        """What lays out conversations with a template; None for the built-in one. The first call tells what it does."""
        source = self.template_in_use(template)
        if source is None:
            return None
        if source not in self._known:
            known = Turns(ChatTemplate(source, self._written()), list(self._structural), self._written()["eos_token"])
            self._known = {**self._known, source: known}
            tell(known, self.stop_ids(source))
        return self._known[source]

    def _own_template(self) -> str | None:
        return None

    @property
    def _structural(self) -> Mapping[str, int]:
        """Tokens that are taken out of a text before it is split any further, by their written form."""
        return self.special_tokens

    def _encode_built_in(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[list[int], list[int]]:
        """`<|role|>` content, then `<|end|>`, or EOS after the assistant, which is where generation stops."""
        ids = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
        chosen = [0] * len(ids)
        for turn, message in enumerate(messages, 1):
            role = message["role"]
            if role not in ROLES:
                raise DataError(
                    f"turn {turn} has role {role!r}, which the built-in chat template does not know; "
                    f"use one of {', '.join(ROLES)}, or set data.chat_template",
                    key="role",
                    value=role,
                    where=f"turn {turn}",
                    offers={"role": ROLES},
                )
            opening, answers = self._marker(role), role == "assistant"
            said = self.encode(message.get("content") or "") + ([self.eos_id] if answers else self._marker("end"))
            ids += opening + said
            chosen += [0] * len(opening) + [int(answers)] * len(said)
        opening = self._marker("assistant") if add_generation_prompt else []
        return ids + opening, chosen + [0] * len(opening)

    def _marker(self, name: str) -> list[int]:
        return self.encode(f"<|{name}|>")

    def _written(self) -> dict[str, Any]:
        """The special tokens that Jinja templates ask for by name."""
        by_id = {token: text for text, token in self.special_tokens.items()}
        return {
            "bos_token": by_id.get(self.bos_id, "") if self.bos_id is not None else "",
            "eos_token": by_id.get(self.eos_id, ""),
        }

    def _encode_markup(self, text: str) -> list[int]:
        """Token ids of a rendered template, in which the written special tokens stand for themselves."""
        return self._encode_anchored(text, False)[0]

    def _encode_anchored(self, text: str, continued: bool) -> tuple[list[int], list[Anchor]]:
        """Token ids of a rendered template, and the first character and index of its tokens of structure.

        The first anchor is the beginning. `continued`: other text comes before.
        """
        special = self.special_tokens
        longest_first = sorted(special, key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        ids: list[int] = []
        anchors: list[Anchor] = [(0, 0)]
        at = 0
        for piece in filter(None, pieces):
            if piece in special:
                anchors.append((at, len(ids)))
                ids.append(special[piece])
            else:
                ids += self._encode_continued(piece) if continued and at == 0 else self.encode(piece)
            at += len(piece)
        return ids, anchors

    def _encode_continued(self, text: str) -> list[int]:
        """Token ids of a text that follows another: without the space that SentencePiece puts before a text."""
        newline, ids = self.encode("\n"), self.encode("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self.encode(text)


def last_turn(marks: Sequence[int]) -> int:
    """Return the index of the first token of the last turn that is marked; the number of tokens if none is."""
    start = len(marks)
    while start > 0 and not marks[start - 1]:
        start -= 1
    if start == 0:
        return len(marks)
    while start > 0 and marks[start - 1]:
        start -= 1
    return start


def read_marker(folder: str | Path) -> dict[str, Any]:
    """Return what `Tokenizer.save` wrote about a tokenizer."""
    marker = Path(folder) / MARKER_FILE
    try:
        return parse_object(read_text(marker))
    except UnreadableError as problem:
        raise ConfigError(f"{marker} {problem}: restore it", where=marker) from None


def write_marker(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write which kind of tokenizer a folder holds, and its fingerprint."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    saved = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint(), "size": tokenizer.size}
    (target / MARKER_FILE).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def digest(state: Any) -> str:
    """Return a hash of plain values."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8")).hexdigest()
