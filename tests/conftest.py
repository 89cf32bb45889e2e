"""Fixtures shared by all tests."""

import gc
import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.worlds import Worlds

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Take what the imports left, a million objects, out of every later search for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what a test, or a library that it wakes, does to logging, so that no other test hears it."""
    manager, root = logging.root.manager, logging.getLogger()
    disable, level, handlers = manager.disable, root.level, list(root.handlers)
    levels = {name: it.level for name, it in manager.loggerDict.items() if isinstance(it, logging.Logger)}
    yield
    manager.disable = disable
    if root.level != level:
        root.setLevel(level)
    root.handlers[:] = handlers
    for name, logger in manager.loggerDict.items():
        if not isinstance(logger, logging.Logger):
            continue
        logger.disabled = False  # a library that configures logging may disable everybody's loggers
        ours = name.split(".")[0] == "megarl"
        before = logging.NOTSET if ours else levels.get(name, logger.level)
        if logger.level != before:  # setting a level visits every logger
            logger.setLevel(before)
        if ours:
            logger.propagate = True
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
