"""Which keys name extensions: objects of the user that the run imports."""

from __future__ import annotations

from typing import Any

_ONE = ("ppo.advantages", "extensions.orchestrator")
_SEVERAL = (
    "extensions.callbacks",
    "extensions.families",
)


def named_extensions(config: Any) -> dict[str, str]:
    """Return the extensions that a configuration names, by key; of a list, by key and index."""
    found = {}
    for key in _ONE:
        if ":" in str(value := _value(config, key)):
            found[key] = str(value)
    for key in _SEVERAL:
        found |= {f"{key}[{index}]": name for index, name in enumerate(_value(config, key) or ())}
    return found


def _value(config: Any, key: str) -> Any:
    """Return the value of a key; None if the configuration has no such key, or its section is null."""
    for part in key.split("."):
        config = getattr(config, part, None)
    return config
