"""What every model that cannot be read comes to: one line."""

from pathlib import Path
from typing import Any

from megarl.errors import CheckpointError, MegarlError
from megarl.models.exchange.formats import open_source
from tests.refusals import refused


def assert_not_opened(path: Path, kind: type[MegarlError] = CheckpointError, **data: Any) -> None:
    """Open a model and find the data in the error that refuses it; see `refused`."""
    with refused(kind, **data):
        open_source(path)
