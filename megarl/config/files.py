"""What a configuration names on disk, looked for before anything heavy is imported."""

import os
import re
from pathlib import Path
from typing import Any

from megarl.errors import CheckpointError, ConfigError, DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
"""Of files with records."""
_HUB_DATA = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")
_HERE = (".", "/", "~")


def check_files(config: Any) -> None:
    """Refuse a source of data or weights that is not there and can be no name on a hub, and a run folder that cannot
    be written."""
    if _value(config, "run.dir") is not None:
        require_room(Path(config.run.dir).expanduser().absolute())
    for key in ("data.train", "data.eval", "clone.data"):
        if key != "data.eval" or _value(config, "trainer.eval_every") is not None:
            for path in _value(config, key) or ():
                require_data(path, key)
    for key in ("model.path", "critic.path"):
        path = _value(config, key)
        if path is not None and (key != "critic.path" or _value(config, "critic.kind") == "separate"):
            require_weights(path)


def require_data(path: str, key: str = "data.train and data.eval") -> None:
    local = Path(path).expanduser()
    if local.exists() or not (local.suffix in SUFFIXES or path.startswith(_HERE) or not _HUB_DATA.match(path)):
        return
    raise DataError(f"{path}: no such file or folder (looked from {Path.cwd()}); check {key}")


def require_weights(path: str) -> None:
    parts = path.split("/")
    if Path(path).expanduser().exists() or not (path.startswith(_HERE) or len(parts) > 2 or not all(parts)):
        return
    raise CheckpointError(f"{path} does not exist: give a folder, or a hub name such as org/model")


def require_room(run_dir: Path) -> None:
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written" if there.is_dir() else "is a file"
        raise ConfigError(f"run.dir={run_dir}: {there} {what}; set run.dir elsewhere")


def _value(config: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section, None), name, None)
