"""Forms that the value of a single key must have: functions `(key, value)` that raise, named by `leaf(form=...)`."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from urllib.parse import urlsplit

from megarl.config.findings import FINDINGS
from megarl.disk import shown, why_no_name
from megarl.errors import ConfigError

MOST_PER_NODE = 1024  # processes
COLDEST = 0.01
"""The lowest temperature of random sampling: below it, rounding of logits decides as much as the logits do."""


def folder_name(key: str, value: str) -> None:
    """Refuse a name that would be another folder than the one it names."""
    if value in ("", ".", "..") or not value.isprintable() or re.search(r"[/\\\\]", value) or value != value.strip():
        raise ConfigError(
            f"{key}={shown(value)!r} is not a valid name: use one word without separators, or set run.dir to the "
            "folder you mean",
            key=key,
            value=value,
        )
    if problem := why_no_name(Path(value)):
        raise ConfigError(
            f"{key}={shown(value)!r} is not a valid name: {problem}; use a shorter one", key=key, value=value
        )


def device_count(key: str, value: int | str) -> None:
    """Refuse what is neither a number of processes that a machine can hold nor "auto"."""
    if value == "auto":
        return
    if not (isinstance(value, int) and value >= 1):
        raise ConfigError(
            f"{key}={shown(value)} is neither a count nor auto: use 1, 2, ... or auto",
            key=key,
            value=value,
            offers={key: ["auto"]},
        )
    if value > MOST_PER_NODE:
        raise ConfigError(
            f"{key}={shown(value)} is out of range: use auto, or at most {MOST_PER_NODE}",
            key=key,
            value=value,
            offers={key: ["auto", MOST_PER_NODE]},
        )


def wall_clock_time(key: str, value: str) -> None:
    """Refuse what is not hours, minutes and seconds."""
    if not re.fullmatch(r"[0-9]{1,6}:[0-5][0-9]:[0-5][0-9]", value):
        raise ConfigError(
            f"{key}={shown(value)} is not HH:MM:SS: for two hours use '02:00:00', quoted in YAML", key=key, value=value
        )


def metric_name(key: str, value: str) -> None:
    """Refuse an empty name of a metric."""
    if not value.strip():
        raise ConfigError(
            f"{key} is empty: use the name of a logged metric, for example eval/loss", key=key, value=value
        )


def resume_choice(key: str, value: str) -> None:
    """Refuse an empty choice of what to resume from."""
    if not value.strip():
        raise ConfigError(
            f"{key} is empty: use auto, never or a checkpoint folder",
            key=key,
            value=value,
            offers={key: ["auto", "never"]},
        )


def temperature(key: str, value: float) -> None:
    """Refuse a temperature at which rounding decides which token is sampled; 0 takes the most likely one."""
    if 0 < value < COLDEST:
        raise ConfigError(
            f"{key}={value} is too low to sample with: use 0 for the most likely token, or at least {COLDEST}",
            key=key,
            value=value,
            offers={key: [0, COLDEST]},
        )


VOTES = ("text", "number", "choice", "boxed")
"""Ready-made ways to read the answer in a response."""


def vote_reader(key: str, value: str) -> None:
    """Refuse what is neither a ready-made way to read answers nor written like the name of a function."""
    place, colon, function = value.rpartition(":")
    if value not in VOTES and not (place and colon and function.isidentifier()):
        raise ConfigError(
            f"{key}={shown(value)} does not say what an answer is: use {', '.join(VOTES)}, or "
            "package.module:function or file.py:function",
            key=key,
            value=value,
            offers={key: VOTES},
        )


def finding_name(key: str, value: str) -> None:
    """Refuse what is not the name of a finding."""
    if value not in FINDINGS:
        near = difflib.get_close_matches(value, FINDINGS, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}?" if near else f"choose from {', '.join(FINDINGS)}"
        raise ConfigError(
            f"{key}=[{shown(value)}] does not name a finding (docs/findings.md): {meant}",
            key=key,
            value=value,
            offers={key: near or FINDINGS},
        )


def server_url(key: str, value: str) -> None:
    """Refuse what is not the address of a server: http or https, a host, and perhaps a port and a path."""
    try:
        parts = urlsplit(value)
        usable = parts.port != 0 and bool(parts.hostname) and parts.scheme in ("http", "https")
    except ValueError:  # a port that is no number, or half of an IPv6 address
        usable = False
    extra = any(sign in value for sign in "?#@") or not value.isascii() or not re.fullmatch(r"\S+", value)
    if not usable or extra:
        raise ConfigError(
            f"{key}={shown(value)} is not the URL of a server: use http://HOST:PORT or https://HOST, without a user, a "
            "query or a fragment; a token belongs in MEGARL_REWARD_TOKEN",
            key=key,
            value=value,
        )
