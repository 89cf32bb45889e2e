"""The bearer token of a reward server: in a file for the server, in the environment for its clients."""

from __future__ import annotations

import os

from megarl.disk import UnreadableError, local, read_text, shown
from megarl.errors import ConfigError

VARIABLE = "MEGARL_REWARD_TOKEN"


def read_token(path: str, key: str) -> str:
    """Return the token in the file of a configuration key. No message contains the token."""
    try:
        token = read_text(local(path)).strip()
        problem = _problem(token)
    except UnreadableError as unreadable:
        token, problem = "", str(unreadable)
    if problem:
        raise ConfigError(
            f"{key}={shown(path)} {problem}: name a file whose only line is the token, readable by this user",
            key=key,
            value=path,
            where=shown(path),
        )
    return token


def token_of_client() -> str | None:
    """Return the token in the environment; None if there is none. No message contains the token."""
    token = os.environ.get(VARIABLE)
    if token is None:
        return None
    if problem := _problem(token.strip()):
        raise ConfigError(f"{VARIABLE} {problem}: set it to the token of the reward servers, or unset it", key=VARIABLE)
    return token.strip()


def _problem(token: str) -> str | None:
    if not token:
        return "is empty"
    if not (token.isascii() and token.isprintable() and " " not in token):
        return "holds more than one word, or characters other than ASCII's"
    return None
