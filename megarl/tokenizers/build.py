"""A tokenizer from its kind and path, or from the folder that it was saved in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.disk import UnreadableError, is_file, read_text
from megarl.errors import ConfigError
from megarl.tokenizers.base import MARKER_FILE, Tokenizer, read_marker
from megarl.tokenizers.huggingface import HuggingFaceTokenizer
from megarl.tokenizers.sentencepiece import SentencePieceTokenizer
from megarl.tokenizers.small import ALPHABET_FILE, ByteTokenizer, CharacterTokenizer

KINDS = ("bytes", "characters", "sentencepiece", "huggingface")


def build_tokenizer(kind: str, path: str | None = None) -> Tokenizer:
    """Return the tokenizer of a kind, one of `KINDS`, from its file, folder or hub name."""
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


def tokenizer_of(config: Any) -> Tokenizer:
    """Return the tokenizer of a configuration whose model is known."""
    tokenizer = build_tokenizer(config.tokenizer.kind, config.tokenizer.path)
    tokenizer.ends_prompts = config.model.encoder is not None
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that `Tokenizer.save` wrote into a folder."""
    if not is_file(Path(folder) / MARKER_FILE):
        raise ConfigError(f"{folder}: holds no tokenizer saved by megarl ({MARKER_FILE} is missing)", where=folder)
    saved = read_marker(folder)
    tokenizer = build_tokenizer(str(saved.get("kind")), str(folder))
    if tokenizer.fingerprint() != saved.get("fingerprint"):
        raise ConfigError(
            f"{folder}: the tokenizer differs from the one that was saved; restore its files", where=folder
        )
    return tokenizer
