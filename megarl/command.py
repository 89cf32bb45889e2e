"""Exit codes, and one-line error messages for problems that the user can fix."""

import contextlib
import io
import os
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from megarl.errors import MegarlError

_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # characters that change the direction of writing
INTERRUPTED = 130
"""The exit code after Ctrl-C, as in shells."""
NOTICED = 143
"""The result of a run that a signal (SIGTERM, SIGUSR1) stopped with a checkpoint. Its command exits with 0, because
srun would kill the ranks that are still writing. Launchers read the status file."""

STATUS_FILE = "MEGARL_STATUS_FILE"
"""Environment variable with the path of a status file. A run that stopped early writes a line to it, so that its
launcher starts it again.

An exit code does not serve: torchrun does not pass it on, and srun would kill the ranks that are still writing. A run
that fails writes its exit code to the same path with `.exit` appended.
"""


def run_command(work: Callable[[], int | None], debug: Callable[[], bool] = lambda: False) -> NoReturn:
    """Call a command's function and exit.

    A `MegarlError` ends in one line on stderr and its exit code (2 for bad input, 3 for bad numbers), with a traceback
    only if `debug()`; any other exception is a bug and keeps its traceback.
    """
    quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal's encoding lacks must not raise
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
    except MegarlError as error:
        if debug():
            traceback.print_exc()
        if not error.said:
            say(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        code = INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if debug() or not _ran_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        say(f"error: out of memory ({said}): use a smaller model, batch or number of responses in flight")
        code = MegarlError.exit_code
    if code == NOTICED or (code == INTERRUPTED and _rank_prefix()):
        code = 0  # a launcher would kill the first process, which may still be writing
    if code and STATUS_FILE in os.environ:
        with contextlib.suppress(OSError):
            Path(f"{os.environ[STATUS_FILE]}.exit").write_text(str(code), encoding="utf-8")
    sys.exit(code or 0)


def _ran_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. Torch has its own class of error for this on GPUs only."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def say(text: str) -> None:
    """Print one line to stderr that any terminal can show, with the rank if this is not the first process."""
    sys.stderr.write(f"{_rank_prefix()}{printable(' '.join(text.split()))}\n")


def printable(text: str) -> str:
    """Return text with its control characters escaped, so that a model's output cannot control a terminal."""
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def _steers(c: str) -> bool:
    return c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs") or c in _TURNS)


def quiet() -> None:
    """Suppress other libraries' warnings about themselves, which a user cannot act on."""
    warnings.filterwarnings("ignore", module=r"(lightning|megatron|torch|transformers)\.")


def process_number(environ: Mapping[str, str] = os.environ) -> int:
    """Return this process's rank in its run, before there is a process group; only the first process has 0.

    torchrun's RANK decides. Else SLURM numbers the tasks of srun (and has 0 in a batch script), and Lightning the
    processes of `trainer.devices`.
    """
    if environ.get("RANK"):
        return int(environ["RANK"])
    return max(int(environ.get(name) or 0) for name in ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def local_process_number(environ: Mapping[str, str] = os.environ) -> int:
    """Return this process's rank on this machine, which is also the index of its GPU.

    torchrun, Lightning and `set_env_from_slurm` set LOCAL_RANK; a process without it is the only one.
    """
    return int(environ.get("LOCAL_RANK") or 0)


def _rank_prefix() -> str:
    try:
        number = process_number()
    except ValueError:  # the launcher's variable is not a number, which `check_launcher` reports
        return ""
    return f"[rank {number}] " if number else ""
