"""The settings of the suite on its command line. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megarl.conformance.features import FEATURES
from megarl.errors import ConfigError
from megarl.report.shell import SELFTEST
from megarl.report.write import page_path

ALL = "--all"
HELP = f"""python -m megarl.selftest --all [key=value ...]

  Trains tiny models with each feature and each pair of features, and compares losses, log-probs, gradients, their norm
  and the parameters after the last step with one process. It starts the processes, or takes those of torchrun.

  only=tp,pp                  only the cases made of these features, of
                              {", ".join(feature.key for feature in FEATURES)}
  steps=3                     optimizer steps of a case
  limit=120                   seconds that a case may take
  html=FILE                   write the table and the differences into FILE, one page that needs no network
"""


@dataclass(frozen=True)
class Suite:
    """What the suite runs.

    Attributes:
        only: the features that cases are made of; empty: all.
        steps: optimizer steps of a case.
        limit: seconds that a case may take.
        html: the file of the page; empty: none.
    """

    only: tuple[str, ...] = ()
    steps: int = 3
    limit: int = 120
    html: str = ""


def parse(argv: list[str]) -> Suite:
    """Parse the key=value words after --all. Refuse unknown keys and invalid values."""
    values: dict[str, Any] = {}
    for word in argv:
        key, equals, text = word.partition("=")
        known = [one.name for one in fields(Suite)]
        if not equals or key not in known:
            raise ConfigError(f"unknown setting '{word}': with {ALL} use key=value with {', '.join(known)}", key=word)
        values[key] = _value(key, text)
    return Suite(**values)


def _value(key: str, text: str) -> Any:
    """Return the value that a text stands for."""
    if key == "only":
        return tuple(dict.fromkeys(_feature(name) for name in text.split(",")))
    if key == "html":
        page_path(text, key, SELFTEST)
        return text
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10**6:
        raise ConfigError(f"{key}={text} is not a whole number from 1 to 1000000", key=key, value=text)
    return int(text)


def _feature(name: str) -> str:
    known = [feature.key for feature in FEATURES]
    if name not in known:
        raise ConfigError(
            f"only={name} is not a feature: choose from {', '.join(known)}",
            key="only",
            value=name,
            offers={"only": known},
        )
    return name
