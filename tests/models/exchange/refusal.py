"""What every model that cannot be read comes to: one line."""

from pathlib import Path

import pytest

from megarl.errors import CheckpointError, MegarlError
from megarl.models.exchange.formats import open_source

Kinds = type[MegarlError] | tuple[type[MegarlError], ...]


def refused(path: Path, *words: str, kind: Kinds = CheckpointError) -> None:
    """Open a model and find all words in the line that refuses it."""
    with pytest.raises(kind) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
