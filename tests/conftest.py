"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.worlds import Worlds

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """One set of gloo processes for the whole test run."""
    worlds = Worlds()
    yield worlds
    worlds.close()
