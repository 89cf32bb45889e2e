"""The errors a user can cause or must see: each says the key, the value and what to do.

Entry points turn them into one line and an exit code; anything else is a bug and keeps its traceback.
"""

LONGEST = 3_000
"""Characters of a message. Of a longer one, which repeats somebody's long value, the middle is left out."""


class MegarlError(Exception):
    """Base of every error that is reported as one clear line, whatever values the message repeats."""

    exit_code = 2
    said = False  # the line is on stderr already, of this process or of the first

    def __str__(self) -> str:
        line = " ".join(super().__str__().splitlines())
        half = LONGEST // 2
        return line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"


class ConfigError(MegarlError):
    """A key or a combination of keys that cannot work."""


class DataError(MegarlError):
    """A file or a record that cannot be used; the message names the file and the record."""


class CheckpointError(MegarlError):
    """A checkpoint that is torn, partial or of another model, or that could not be written."""


class RewardError(MegarlError):
    """A reward function that failed: it raised, timed out, died, or returned something that is no score."""


class UnavailableError(MegarlError):
    """The machine or an installed package does not offer what was asked for."""


class NumericsError(MegarlError):
    """Training produced numbers that must not be trained on (NaN, infinity)."""

    exit_code = 3


class InvariantError(NumericsError):
    """A property that always holds was seen broken; the message names it."""
