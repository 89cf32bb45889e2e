"""Files that hold a bearer token, of a reward server and of its clients."""

from __future__ import annotations

from megarl.disk import UnreadableError, local, read_text, shown
from megarl.errors import ConfigError


def read_token(path: str, key: str) -> str:
    """Return the token in the file of a configuration key. No message contains the token."""
    try:
        token = read_text(local(path)).strip()
        problem = None if token else "is empty"
    except UnreadableError as unreadable:
        token, problem = "", str(unreadable)
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        problem = "holds more than one word, or characters other than ASCII's"
    if problem:
        raise ConfigError(
            f"{key}={shown(path)} {problem}: name a file whose only line is the token, readable by this user",
            key=key,
            value=path,
            where=shown(path),
        )
    return token
