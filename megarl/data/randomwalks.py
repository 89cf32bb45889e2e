"""The old home of megarl.tasks.randomwalks, for one release."""

import warnings

from megarl.tasks.randomwalks import ALPHABET, RandomWalks, optimality, task

__all__ = ["ALPHABET", "RandomWalks", "optimality", "task"]
warnings.warn(
    "megarl.data.randomwalks has moved: import megarl.tasks.randomwalks, see docs/migrate.md",
    FutureWarning,
    stacklevel=2,
)
