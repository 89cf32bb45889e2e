"""Text to token ids and back: one interface over bytes, SentencePiece and Hugging Face tokenizers.

Records and batches are not known here, and a library is imported only when its kind of tokenizer is built.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
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
from megarl.disk import UnreadableError, is_dir, is_file, local, parse_object, read_text, shown
from megarl.errors import ConfigError, DataError, UnavailableError, first_line
from megarl.published_tokenizers import encoding, load_published, published_state, unusable

KINDS = ("bytes", "characters", "sentencepiece", "huggingface")
ROLES = ("system", "user", "assistant")
MARKER_FILE = "megarl_tokenizer.json"
ALPHABET_FILE = "alphabet.txt"
SENTENCEPIECE_FILE = "tokenizer.model"
MOST_TOKENS = 2**24
"""Entries of a vocabulary. A larger id is damage, and work that grows with it would take for ever."""


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
        """Token ids of a text that opens a sequence: with `bos_id` first, where the tokenizer adds one."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None else ids

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
        """
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

    def encode_chat_prompt(self, messages: Sequence[Message], template: str | None = None) -> list[int]:
        """Token ids of a conversation to be answered, in which earlier answers stand as `encode_chat` has them."""
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
        marker = "" if turns is None else turns.marker
        written = next((text for text in self._structural if marker.endswith(text)), None)
        return tuple(dict.fromkeys((self.eos_id, self.eos_id if written is None else self._structural[written])))

    def _turns(self, template: str | None) -> Turns | None:
        """What lays out conversations with a template; None for the built-in one. The first call tells what it does."""
        source = self._own_template() if template is None else template
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


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, followed by padding, EOS and the markers of a chat."""

    kind = "bytes"
    _SPECIAL: ClassVar[dict[str, int]] = {
        text: 256 + index
        for index, text in enumerate(("<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"))
    }

    def __init__(self) -> None:
        self.size = 256 + len(self._SPECIAL)
        self.pad_id = self._SPECIAL["<|pad|>"]
        self.eos_id = self._SPECIAL["<|eos|>"]

    def encode(self, text: str) -> list[int]:
        # A lone surrogate (JSON may hold one) has no UTF-8 form; it becomes "?" rather than a crash.
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(token) for token in ids if 0 <= token < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        _write_marker(folder, self)

    def fingerprint(self) -> str:
        return _digest([self.kind, self._SPECIAL])

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._SPECIAL)

    def _marker(self, name: str) -> list[int]:
        return [self._SPECIAL[f"<|{name}|>"]]


class CharacterTokenizer(Tokenizer):
    """One id per character of an alphabet, then padding and EOS: for small formal tasks."""

    kind = "characters"

    def __init__(self, alphabet: str) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise unusable(alphabet, ": give the alphabet, each character once")
        self.alphabet = alphabet
        self.ids = {character: index for index, character in enumerate(alphabet)}
        self.pad_id, self.eos_id = len(alphabet), len(alphabet) + 1
        self.size = len(alphabet) + 2

    def encode(self, text: str) -> list[int]:
        unknown = next((character for character in text if character not in self.ids), None)
        if unknown is not None:
            raise DataError(
                f"{text[:40]!r} holds {unknown!r}, which is not in tokenizer.path={self.alphabet}: add it, or take it "
                "out of the text",
                key="tokenizer.path",
                value=self.alphabet,
            )
        return [self.ids[character] for character in text]

    def _encode_continued(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[token] for token in ids if 0 <= token < len(self.alphabet))

    def save(self, folder: str | Path) -> None:
        _write_marker(folder, self)
        (Path(folder) / ALPHABET_FILE).write_text(self.alphabet, encoding="utf-8")

    def fingerprint(self) -> str:
        return _digest([self.kind, self.alphabet])

    @property
    def special_tokens(self) -> dict[str, int]:
        return {"<|pad|>": self.pad_id, "<|eos|>": self.eos_id}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file; texts start with BOS where the model defines one."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        """Load a model from its file, or from a folder that holds it as `tokenizer.model`."""
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UnavailableError(
                "tokenizer.kind=sentencepiece: pip install sentencepiece", key="tokenizer.kind", value=self.kind
            ) from error
        self.path = local(path)
        if is_dir(self.path):
            self.path = self.path / SENTENCEPIECE_FILE
        if not is_file(self.path):
            raise ConfigError(
                f"tokenizer.path={shown(path)!r}: no such file; give a SentencePiece .model file",
                key="tokenizer.path",
                value=str(path),
            )
        self._processor = SentencePieceProcessor()
        try:
            self._processor.Load(str(self.path))
        except (OSError, RuntimeError) as error:
            raise unusable(path, " is not a SentencePiece model; give a .model file") from error
        if self._processor.eos_id() < 0:
            raise unusable(path, " has no EOS, so no response could end; train the SentencePiece model with an eos_id")
        self.size = self._processor.GetPieceSize()
        self.eos_id = self._processor.eos_id()
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.adds_bos = self.bos_id is not None
        self._special = {
            self._processor.IdToPiece(token): token for token in range(self.size) if self._processor.IsControl(token)
        }
        self._fingerprint = _digest([self.kind, hashlib.sha256(self.path.read_bytes()).hexdigest()])

    def encode(self, text: str) -> list[int]:
        return list(self._processor.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self._special.values())
        kept = [int(token) for token in ids if 0 <= token < self.size and int(token) not in special]
        return str(self._processor.DecodeIds(kept))

    def save(self, folder: str | Path) -> None:
        _write_marker(folder, self)
        target = Path(folder) / SENTENCEPIECE_FILE
        if target.resolve() != self.path.resolve():
            shutil.copyfile(self.path, target)

    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._special)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of a Hugging Face folder or hub name, with its own chat template where it has one."""

    kind = "huggingface"

    def __init__(self, path: str) -> None:
        self._tokenizer = load_published(path)
        own = self._tokenizer
        if own.eos_token_id is None:
            raise unusable(path, " has no EOS, so no response could end; set eos_token in its tokenizer_config.json")
        vocabulary = own.get_vocab()
        # A vocabulary may have holes, so its largest id can be past the number of its entries.
        self.size = max(len(own), *(token + 1 for token in vocabulary.values()))
        if self.size > MOST_TOKENS:
            raise unusable(
                path,
                f" has the id {self.size - 1}, and no vocabulary has more than {MOST_TOKENS} "
                "entries: restore its tokenizer.json",
            )
        self.eos_id = int(own.eos_token_id)
        self.pad_id = int(own.pad_token_id) if own.pad_token_id is not None else self.eos_id
        self.bos_id = int(own.bos_token_id) if own.bos_token_id is not None else None
        opening = own("a", verbose=False)["input_ids"][:1]
        self.adds_bos = self.bos_id is not None and opening == [self.bos_id]
        self._special = {
            str(token.content): int(index) for index, token in own.added_tokens_decoder.items() if token.special
        }
        self._special |= {text: int(own.convert_tokens_to_ids(text)) for text in own.all_special_tokens}
        self._added = {str(token.content): int(index) for index, token in own.added_tokens_decoder.items()}
        self._added_ids = frozenset(self._added.values())
        self._fingerprint = _digest([self.kind, *published_state(own, vocabulary)])

    def encode(self, text: str) -> list[int]:
        with encoding(self._tokenizer.name_or_path, text):
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(token) for token in ids if 0 <= token < self.size]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _own_template(self) -> str | None:
        own = self._tokenizer
        try:
            return str(own.get_chat_template()) if own.chat_template else None
        except ValueError as error:  # several templates, of which none is the default
            raise unusable(own.name_or_path, f": {first_line(error, kind=True)}; set data.chat_template") from error

    @property
    def _structural(self) -> Mapping[str, int]:
        return self._added

    def _written(self) -> dict[str, Any]:
        return {"bos_token": "", "eos_token": ""} | dict(self._tokenizer.special_tokens_map)

    def _encode_anchored(self, text: str, continued: bool) -> tuple[list[int], list[Anchor]]:
        own = self._tokenizer
        if continued:
            # After a line feed, whose tokens are left out again: a tokenizer may put a space before a text.
            newline = self.encode("\n")
            ids, anchors = self._encode_anchored("\n" + text, False)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :], [(0, 0), *((at - 1, place - len(newline)) for at, place in anchors[1:])]
        if not own.is_fast:
            return self.encode(text), [(0, 0)]
        with encoding(own.name_or_path, text):
            encoded = own(
                text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
            )
        ids, structural = encoded["input_ids"], self._added_ids
        offsets = encoded["offset_mapping"]
        places = [place for place, token in enumerate(ids) if token in structural]
        return ids, [(0, 0), *((offsets[place][0], place) for place in places)]

    def save(self, folder: str | Path) -> None:
        _write_marker(folder, self)
        self._tokenizer.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._special)


def build_tokenizer(kind: str, path: str | None = None) -> Tokenizer:
    """The tokenizer of a kind, one of `KINDS`, from its file, folder or hub name."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind not in KINDS:
        raise ConfigError(
            f"tokenizer.kind={kind!r} is unknown; use one of {', '.join(KINDS)}",
            key="tokenizer.kind",
            value=kind,
            offers={"tokenizer.kind": KINDS},
        )
    if not path:
        raise ConfigError(f"tokenizer.kind={kind} needs tokenizer.path, which is not set", key="tokenizer.path")
    if kind == "characters":
        saved = Path(path) / ALPHABET_FILE
        try:
            return CharacterTokenizer(read_text(saved) if is_file(saved) else path)
        except UnreadableError as problem:
            raise ConfigError(
                f"tokenizer.path={path}: {saved} {problem}: restore it", key="tokenizer.path", value=path, where=saved
            ) from None
    return SentencePieceTokenizer(path) if kind == "sentencepiece" else HuggingFaceTokenizer(path)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into a folder."""
    if not is_file(Path(folder) / MARKER_FILE):
        raise ConfigError(f"{folder}: holds no tokenizer saved by megarl ({MARKER_FILE} is missing)", where=folder)
    saved = read_marker(folder)
    tokenizer = build_tokenizer(str(saved.get("kind")), str(folder))
    if tokenizer.fingerprint() != saved.get("fingerprint"):
        raise ConfigError(
            f"{folder}: the tokenizer differs from the one that was saved; restore its files", where=folder
        )
    return tokenizer


def read_marker(folder: str | Path) -> dict[str, Any]:
    """What `Tokenizer.save` wrote about a tokenizer."""
    marker = Path(folder) / MARKER_FILE
    try:
        return parse_object(read_text(marker))
    except UnreadableError as problem:
        raise ConfigError(f"{marker} {problem}: restore it", where=marker) from None


def _write_marker(folder: str | Path, tokenizer: Tokenizer) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    saved = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint(), "size": tokenizer.size}
    (target / MARKER_FILE).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8")).hexdigest()
