"""A person as the reward function: each response is shown in the terminal, and a number is typed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

TERMINAL = "MEGARL_TERMINAL"
"""Environment variable with the terminal of the run, which the process of a reward function does not have itself."""


def ask(
    prompts: Sequence[str],
    outputs: Sequence[str],
    *,
    question: str = "score",
    lowest: float = -math.inf,
    highest: float = math.inf,
    terminal: str | None = None,
    **_: Any,
) -> list[float | None]:
    """Return the number that a person types for each response; None where they skip it with "s".

    Args:
        question: what is asked.
        lowest, highest: numbers outside are asked again.
        terminal: path of another terminal than the run's, as `tty` prints it there.
    """
    path = terminal or os.environ.get(TERMINAL)
    if path is None:
        raise RuntimeError(
            "the run has no terminal to ask in: start it in one, or set reward.options.terminal to what `tty` prints"
        )
    bounds = "" if lowest == -math.inf and highest == math.inf else f" ({lowest:g} to {highest:g})"
    with _opened(path) as (read, write):
        return [
            _ask_one(f"{number}/{len(outputs)}", prompt, output, question + bounds, (lowest, highest), read, write)
            for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1)
        ]


@contextmanager
def _opened(path: str) -> Iterator[tuple[TextIO, TextIO]]:
    """Yield a terminal, opened to read and to write."""
    with ExitStack() as stack:
        try:
            read = stack.enter_context(Path(path).open(encoding="utf-8"))
            write = stack.enter_context(Path(path).open("w", encoding="utf-8"))
        except OSError as problem:
            raise RuntimeError(
                f"the terminal {path} cannot be opened ({problem.strerror}): set reward.options.terminal to what `tty` "
                "prints in a terminal of this machine"
            ) from None
        yield read, write


def _ask_one(
    number: str, prompt: str, output: str, question: str, bounds: tuple[float, float], read: TextIO, write: TextIO
) -> float | None:
    print(f"\n--- response {number}\n{_shown(prompt)}\n> {_shown(output)}", file=write)
    while True:
        print(f"{question}, or s to skip: ", end="", file=write, flush=True)
        line = read.readline()
        if not line:
            raise EOFError("the terminal was closed before all responses had a score")
        if line.strip().lower() == "s":
            return None
        try:
            value = float(line)
        except ValueError:
            continue
        if math.isfinite(value) and bounds[0] <= value <= bounds[1]:
            return value


def _shown(text: str) -> str:
    """Return a text without characters that would control the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
