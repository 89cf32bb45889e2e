"""Fixtures shared by all tests."""

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.worlds import Worlds

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what a test, or a library that it wakes, does to logging, so that no other test hears it."""
    manager, root = logging.root.manager, logging.getLogger()
    disable, level, handlers = manager.disable, root.level, list(root.handlers)
    levels = {name: it.level for name, it in manager.loggerDict.items() if isinstance(it, logging.Logger)}
    yield
    manager.disable = disable
    root.setLevel(level)
    root.handlers[:] = handlers
    for name, logger in manager.loggerDict.items():
        if not isinstance(logger, logging.Logger):
            continue
        logger.disabled = False  # a library that configures logging may disable everybody's loggers
        logger.setLevel(levels.get(name, logger.level))
        if name.split(".")[0] == "megarl":
            logger.propagate = True
            logger.setLevel(logging.NOTSET)
            logger.handlers.clear()


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """One set of gloo processes for the whole test run."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture(params=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products by each of the two, whichever this machine would take."""
    from megarl.parallel import products

    onednn = request.param == "onednn"
    if onednn and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN for dense tensors")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
