"""Logging of a run: short lines of the first process on the console, and all records in one file per process.

Libraries log through `get_logger(__name__)`; only entry points call `setup`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

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
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OURS = "megarl"
_seen: set[tuple[str, str]] = set()


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
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "megarl", False)]:
        root.removeHandler(handler)
        handler.close()
    level = logging.DEBUG if debug else logging.INFO
    console: logging.Handler = _Console()
    console.setLevel(level if rank == 0 else logging.ERROR)
    console.addFilter(_quiet_foreign)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
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
