"""Logging of a run: short lines of the first process on the console, and all records in one file per process.

Libraries log through `get_logger(__name__)`; only entry points call `setup`. A script decides what the console shows,
before or during a run: `set_verbosity("debug")`, `enable_explicit_format()`, `disable_progress_bar()`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megarl.errors import ConfigError

if TYPE_CHECKING:
    _TextHandler = logging.StreamHandler[TextIO]
else:
    _TextHandler = logging.StreamHandler  # Python 3.10 cannot subscript it

FOREIGN = (
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "megatron",
    "torch",
    "transformer_engine",
    "transformers",
)
DEBUG, INFO, WARNING, ERROR, CRITICAL = (
    *(logging.DEBUG, logging.INFO, logging.WARNING),
    *(logging.ERROR, logging.CRITICAL),
)
LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": CRITICAL}
"""What the console can show, by name, the most first."""
VERBOSITY = "MEGARL_VERBOSITY"
"""Environment variable with the level of a process in which `set_verbosity` is not called."""
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_EXPLICIT = "[%(asctime)s %(levelname)s %(filename)s:%(lineno)d:%(funcName)s rank {rank}] %(message)s"
_OURS = "megarl"
_seen: set[tuple[str, str]] = set()


class _Choices:
    """What was chosen for this process's console and progress bars."""

    verbosity: int | None = None  # None: the environment's, else info
    explicit = False
    progress_bar = True
    rank, debug = 0, False  # of the last `setup`


def set_verbosity(level: str | int) -> None:
    """Set the least severe level that the console shows: a name of `LEVELS` or a number of Python's logging.

    It takes effect at once and for later runs of this process. Files of a run keep all from info on, or from debug.
    """
    _Choices.verbosity = _level(level, "level")
    _refresh()


def get_verbosity() -> int:
    """Return the least severe level that the console shows, as a number of Python's logging."""
    if _Choices.verbosity is not None:
        return _Choices.verbosity
    named = os.environ.get(VERBOSITY)
    return logging.INFO if not named else _level(named, VERBOSITY)


def enable_explicit_format() -> None:
    """Show with each line of the console its time, level, file, line, function and rank."""
    _Choices.explicit = True
    _refresh()


def reset_format() -> None:
    """Show the lines of the console without their time and origin, as at first."""
    _Choices.explicit = False
    _refresh()


def disable_progress_bar() -> None:
    """Show plain lines in the place of progress bars, in later runs too."""
    _Choices.progress_bar = False


def enable_progress_bar() -> None:
    """Show progress bars on terminals again."""
    _Choices.progress_bar = True


def is_progress_bar_enabled() -> bool:
    """Return whether terminals show progress bars."""
    return _Choices.progress_bar


def _level(level: str | int, key: str) -> int:
    """Return a level as a number; refuse what is none."""
    if isinstance(level, int) and not isinstance(level, bool):
        return level
    found = int(level) if str(level).isdigit() else LEVELS.get(str(level).lower())
    if found is None:
        raise ConfigError(
            f"{key}={level} is not a valid level: use {', '.join(LEVELS)}",
            key=key,
            value=level,
            offers={key: list(LEVELS)},
        )
    return found


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a megarl module: `get_logger(__name__)`."""
    return logging.getLogger(name if name.split(".")[0] == _OURS else f"{_OURS}.{name}")


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning only the first time in this process."""
    _log_once(logger, logging.WARNING, message)


def info_once(logger: logging.Logger, message: str) -> None:
    """Log a message only the first time in this process."""
    _log_once(logger, logging.INFO, message)


def _log_once(logger: logging.Logger, level: int, message: str) -> None:
    if (logger.name, message) not in _seen:
        _seen.add((logger.name, message))
        logger.log(level, "%s", message)


def setup(run_dir: Path | None, rank: int, debug: bool) -> None:
    """Send log records to the console and, with a run folder, to `run_dir/logs/rank-NNNN.log`.

    Calling it again replaces the earlier destinations. The console shows, of rank 0, megarl's
    messages and others' warnings, and errors of every rank; the file keeps all of them.

    Args:
        run_dir: folder of the run; null for the console only.
        rank: this process's rank in the whole run.
        debug: log detail too.
    """
    _Choices.rank, _Choices.debug = rank, debug
    shown = _shown()
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "megarl", False)]:
        root.removeHandler(handler)
        handler.close()
    level = min(shown, logging.INFO)
    console = _Console()
    console.addFilter(_quiet_foreign)
    console.show(shown)
    _add(root, console)
    if run_dir is not None:
        folder = Path(run_dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank-{rank:04d}.log", encoding="utf-8")
        file.setLevel(level)
        file.setFormatter(logging.Formatter(_FORMAT))
        _add(root, file)
    root.setLevel(logging.INFO)  # other libraries' debug output would hide megarl's, even in the file
    logging.getLogger(_OURS).setLevel(level)
    logging.captureWarnings(True)
    for name in FOREIGN:
        _adopt(logging.getLogger(name))


class _Console(_TextHandler):
    """Writes to the current stderr, which a progress display replaces to keep lines above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def show(self, level: int) -> None:
        """Show records of rank 0 from a level on, and of other ranks only errors, in the chosen format."""
        rank = _Choices.rank
        self.setLevel(level if rank == 0 else max(level, logging.ERROR))
        short = "%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"
        self.setFormatter(logging.Formatter(_EXPLICIT.format(rank=rank) if _Choices.explicit else short))


def _refresh() -> None:
    """Apply what was chosen to the console of a run that has begun."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Console):
            handler.show(_shown())
            logging.getLogger(_OURS).setLevel(min(_shown(), logging.INFO))


def _shown() -> int:
    """Return the least severe level that the console of rank 0 shows."""
    return min(get_verbosity(), logging.DEBUG) if _Choices.debug else get_verbosity()


def _add(root: logging.Logger, handler: logging.Handler) -> None:
    handler.megarl = True  # type: ignore[attr-defined]
    root.addHandler(handler)


def _quiet_foreign(record: logging.LogRecord) -> bool:
    """Return False for records below WARNING from other libraries."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0] == _OURS


def _adopt(logger: logging.Logger) -> None:
    """Remove a library's own console handlers, so that its records reach ours, once."""
    for handler in list(logger.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
    logger.propagate = True
