"""Reward functions of whole runs, good and bad; the worker imports them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

LATE = 24  # responses after which `written_down` may be held up


def written_down(samples: list[str], outputs: list[str], folder: str, **_: Any) -> list[float]:
    """Different letters of a response; what was scored is added to a file once it is known.

    Where there is a file `hold`, the call that comes after `LATE` responses leaves `held` and never returns.
    """
    known, hold = Path(folder, "scored.txt"), Path(folder, "hold")
    scores = [float(len(set(output))) for output in outputs]
    if hold.exists() and known.exists() and len(known.read_text().splitlines()) >= LATE:
        Path(folder, "held").touch()
        time.sleep(3600)
    with known.open("a") as file:
        file.writelines(sample + "\n" for sample in samples)
    return scores


def counted(outputs: list[str], folder: str, **_: Any) -> list[float]:
    """Different letters of a response; how many samples a call asked about is written down."""
    with Path(folder, "calls.txt").open("a") as file:
        file.write(f"{len(outputs)}\n")
    return [float(len(set(output))) for output in outputs]


def sleeps_once(outputs: list[str], folder: str, **_: Any) -> list[float]:
    """Never returns from its first call."""
    mark = Path(folder, "slept")
    if not mark.exists():
        mark.touch()
        time.sleep(3600)
    return [float(len(output)) for output in outputs]


def not_a_number(outputs: list[str], **_: Any) -> list[float]:
    return [float("nan")] * len(outputs)


def picky(prompts: list[str], outputs: list[str], **_: Any) -> list[float]:
    """Has no score for responses to prompts of the first half of the alphabet."""
    return [
        float(len(output)) if prompt > "k" else float("nan") for prompt, output in zip(prompts, outputs, strict=True)
    ]


def indifferent(outputs: list[str], **_: Any) -> list[float]:
    return [1.0] * len(outputs)


def seldom(prompts: list[str], outputs: list[str], **_: Any) -> list[float]:
    """Has the same score for all responses to prompts of the first half of the alphabet."""
    return [float(len(set(output))) if prompt > "k" else 0.0 for prompt, output in zip(prompts, outputs, strict=True)]


def seldom_at_first(prompts: list[str], outputs: list[str], folder: str, **_: Any) -> list[float]:
    """Like `seldom` in the first calls, later the same score for all responses."""
    calls = Path(folder, "calls.txt")
    with calls.open("a") as file:
        file.write("a call\n")
    return seldom(prompts, outputs) if len(calls.read_text().splitlines()) <= 6 else indifferent(outputs)


def even(outputs: list[str], **_: Any) -> list[float]:
    """1 if a response has an even number of characters."""
    return [float(len(output) % 2 == 0) for output in outputs]


def kills_the_run(samples: list[str], outputs: list[str], folder: str, late: int = LATE, **_: Any) -> list[float]:
    """1 if a response has an even number of characters; what was scored is added to a file once it is known.

    Where there is a file `kill`, the call that comes after `late` responses kills the process that called.
    """
    known, kill = Path(folder, "scored.txt"), Path(folder, "kill")
    if kill.exists() and known.exists() and len(known.read_text().splitlines()) >= late:
        kill.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(3600)
    with known.open("a") as file:
        file.writelines(f"{sample!r}\n" for sample in samples)
    return [float(len(output) % 2 == 0) for output in outputs]
