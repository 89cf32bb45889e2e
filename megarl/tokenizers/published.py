"""Tokenizers as Hugging Face's library loads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.disk import exists, local, shown, why_no_name
from megarl.errors import ConfigError, UnavailableError, first_line


def unusable(path: str | Path, problem: str) -> ConfigError:
    """The error of a `tokenizer.path` that no tokenizer can be made of."""
    return ConfigError(f"tokenizer.path={str(path)!r}{problem}", key="tokenizer.path", value=str(path))


def load_published(path: str) -> Any:
    """Load a Hugging Face tokenizer from a folder or hub name."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnavailableError(
            "tokenizer.kind=huggingface: pip install transformers", key="tokenizer.kind", value="huggingface"
        ) from error
    place = local(path)
    there = exists(place)
    if not there and (place.is_absolute() or path.startswith((".", "~")) or why_no_name(place)):
        raise ConfigError(
            f"tokenizer.path={shown(path)!r}: no such folder; give one that holds tokenizer.json, or a hub name",
            key="tokenizer.path",
            value=path,
        )
    try:
        found = AutoTokenizer.from_pretrained(str(place) if there else path, trust_remote_code=False)
        found("a", verbose=False)  # settings that cannot be are only looked at when something is encoded
        return found
    except BaseException as error:  # the hub, the file formats and Python code each raise their own kinds
        if not _of_the_library(error):
            raise
        raise unusable(
            path,
            f" cannot be loaded as a Hugging Face tokenizer ({first_line(error, kind=True)}); "
            "give a folder that holds tokenizer.json, or a hub name that is cached or can be reached",
        ) from error


@contextmanager
def encoding(path: str, text: str) -> Iterator[None]:
    """A text that a tokenizer fails at is told with the tokenizer's place."""
    try:
        yield
    except BaseException as error:
        if not _of_the_library(error):
            raise
        raise unusable(
            path, f" cannot encode {shown(text)!r} ({first_line(error, kind=True)}): restore its tokenizer.json"
        ) from error


def _of_the_library(error: BaseException) -> bool:
    """Errors, and panics of its part in Rust, which are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def published_state(own: Any, vocabulary: dict[str, int]) -> list[Any]:
    """What decides the ids of a tokenizer, without the settings that calls change (padding, truncation)."""
    state: list[Any] = [vocabulary, own.chat_template, own.eos_token_id, own.pad_token_id, own.bos_token_id]
    backend = getattr(own, "backend_tokenizer", None)
    if backend is not None:
        stages = json.loads(backend.to_str())
        state.append({name: stages.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")})
    return state
