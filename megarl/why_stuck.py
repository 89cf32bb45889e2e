"""`python -m megarl.why_stuck RUN`: find the rank that the others wait for, and its phase, from a run's heartbeats.

Exit code 0 if it names a rank, 1 if no rank is found to hold up the others, 2 if there is nothing to read.
"""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megarl.command import run_command
from megarl.errors import ConfigError
from megarl.heartbeat import BEAT_S, FOLDER, Heartbeat, diagnose, read

HELP = """python -m megarl.why_stuck RUN [beat=SECONDS]

  RUN       folder of a run, on a file system that this machine sees too
  beat=5    seconds between two heartbeats of a rank; a rank that misses three counts as silent
"""
_MOST_ROWS = 32


def report(heartbeats: Sequence[Heartbeat], blamed: Sequence[int], now: float) -> None:
    """Print a table of the last heartbeat of each rank: first the ranks that hold up the others, at most 32 rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("rank", "host", "process", "phase", "step", "for (s)", "last sign (s ago)", "collective", "at")
    ordered = sorted(heartbeats, key=lambda heartbeat: (heartbeat.rank not in blamed, heartbeat.rank))
    for heartbeat in ordered[:_MOST_ROWS]:
        ages = (f"{now - heartbeat.since:.0f}", f"{now - heartbeat.alive:.0f}")
        phase = heartbeat.phase or "-"
        row = (
            str(heartbeat.rank),
            heartbeat.host,
            str(heartbeat.pid),
            phase,
            str(heartbeat.step),
            *ages,
            heartbeat.collective,
            heartbeat.at,
        )
        table.add_row(*map(Text, row), style="bold" if heartbeat.rank in blamed else None)
    console = Console()
    console.print(table)
    if len(ordered) > _MOST_ROWS:
        console.print(f"and {len(ordered) - _MOST_ROWS} more ranks")


def run(argv: Sequence[str]) -> int:
    """Diagnose the run that the command line names. Return the exit code."""
    folders = [word for word in argv if "=" not in word]
    settings = dict(word.split("=", 1) for word in argv if "=" in word)
    beat = settings.pop("beat", str(BEAT_S))
    if len(folders) != 1 or settings or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", beat):
        raise ConfigError(
            f"'{' '.join(argv)}' is not RUN [beat=SECONDS]: name one run folder", key="RUN", value=list(argv)
        )
    heartbeats = read(Path(folders[0]))
    if not heartbeats:
        raise ConfigError(
            f"{folders[0]} has no {FOLDER}/rank-*.json that can be read: name the folder of a run that has started",
            where=folders[0],
        )
    now = time.time()
    verdict = diagnose(heartbeats, now, float(beat))
    report(heartbeats, verdict.ranks, now)
    sys.stdout.write(verdict.sentence + "\n")
    return 0 if verdict.ranks else 1


def main() -> None:
    """Run the command."""
    if not sys.argv[1:] or {"--help", "-h"} & set(sys.argv[1:]):
        sys.stdout.write(HELP)
        sys.exit(0)
    run_command(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
