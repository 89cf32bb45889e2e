"""The callbacks that `extensions.callbacks` names: imported, checked and made."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint

from megarl.errors import ConfigError, MegarlError
from megarl.functions.extensions import failed, load, wrong_kind
from megarl.functions.named import resolve

KEY, OPTIONS = "extensions.callbacks", "extensions.callback_options"


def own_callbacks(names: Sequence[str], options: Mapping[str, Any]) -> list[Callback]:
    """Return an object of each class. Each gets the options that it takes; an option that none takes is refused."""
    kinds = [_kind(name) for name in names]
    taken = [_taken(kind, options) for kind in kinds]
    unused = [option for option in options if not any(option in each for each in taken)]
    if unused:
        raise ConfigError(
            f"{OPTIONS}.{unused[0]}: none of {KEY}=[{','.join(names)}] has such an option; remove it, or correct its "
            "name",
            key=f"{OPTIONS}.{unused[0]}",
            value=options[unused[0]],
        )
    return [_made(name, kind, given) for name, kind, given in zip(names, kinds, taken, strict=True)]


def failure_of(error: BaseException, names: Sequence[str]) -> ConfigError | None:
    """Return the error of one line for an exception that a callback of the user raised; None for any other."""
    passed = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    for name in names:
        file = inspect.getsourcefile(load(KEY, name, "class"))
        if file in passed:
            return failed(KEY, name, "failed", error, file)
    return None


def _kind(name: str) -> type[Callback]:
    found = load(KEY, name, "class")
    if not (isinstance(found, type) and issubclass(found, Callback)):
        raise wrong_kind(KEY, name, "a subclass of lightning.pytorch.Callback", found)
    if issubclass(found, Checkpoint):
        raise ConfigError(
            f"{KEY}={name} writes checkpoints, and a resume knows only megarl's: remove it, and set checkpoint.every, "
            "checkpoint.keep_last or checkpoint.best",
            key=KEY,
            value=name,
        )
    return found


def _taken(kind: type[Callback], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a class takes."""
    accepted = inspect.signature(kind).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted):
        return dict(options)
    return {one.name: options[one.name] for one in accepted if one.name in options}


def _made(name: str, kind: type[Callback], given: Mapping[str, Any]) -> Callback:
    try:
        return kind(**given)
    except MegarlError:
        raise
    except (Exception, SystemExit) as error:  # the user's code raises anything
        said = f"cannot be made with {OPTIONS}={dict(given)}" if given else f"cannot be made without {OPTIONS}"
        raise failed(KEY, name, said, error, resolve(name, KEY, "class").file) from error
