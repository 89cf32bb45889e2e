"""What every model that cannot be read comes to: one line."""

from pathlib import Path
from typing import Any

from megarl.errors import CheckpointError
from megarl.models.exchange.formats import open_source
from tests.refusals import refused


def assert_not_opened(path: Path, **data: Any) -> None:
    """Open a model and find the data in the error that refuses it; see `refused`."""
    with refused(CheckpointError, **data):
        open_source(path)
