"""`python -m megarl.algorithm NAME [key=value ...]`: train by an algorithm outside of megarl, or by one of its own.

NAME is package.module:NAME, path/to/file.py:NAME, or the name that an installed package announces. It stands for a
`megarl.config.algorithms.Algorithm`; docs/extending.md shows one.
"""

import sys
from functools import partial
from typing import NoReturn

from megarl.command import run_command
from megarl.config.algorithms import ALGORITHMS
from megarl.config.compose import run
from megarl.errors import ConfigError
from megarl.training import train

USAGE = """usage: megarl train NAME [KEY=VALUE ...]        megarl train NAME --help

NAME: package.module:NAME or path/to/file.py:NAME of an algorithm of yours, one that
an installed package announces, or one of megarl's: megarl ls algorithms
"""


def main() -> NoReturn:
    """Run the algorithm that the first word of the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h") or "=" in words[0]:
        run_command(partial(_not_named, words), lambda: False)
    run(words[0], words[1:], partial(train, words[0]))


def _not_named(words: list[str]) -> int:
    """Answer a command line without the name of an algorithm."""
    if words and "=" in words[0]:
        raise ConfigError(
            f"megarl train begins with the name of an algorithm, and {words[0]} is a setting: write megarl train NAME "
            f"{words[0]}, where NAME is yours as package.module:NAME, or one of {', '.join(ALGORITHMS)}",
            key="algorithm",
            value=words[0],
            offers={"algorithm": list(ALGORITHMS)},
        )
    sys.stdout.write(USAGE)
    return 0


if __name__ == "__main__":
    main()
