"""The environments that several gates compare with, and a browser."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarl.parallel.megatron_versions import NEWEST, PACKAGE
from tests.gates.browsing import source_of_axe, started
from tests.gates.environments import ROOT, install, make_environment

TRL = "trl==1.16.0"
PEFT = ("peft==0.21.2", "transformers", "torch")


@pytest.fixture(scope="session")
def trl_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with TRL; `MEGARL_GATE_TRL` names the interpreter of one that is there already."""
    there = os.environ.get("MEGARL_GATE_TRL")
    return Path(there) if there is not None else _installed(tmp_path_factory.mktemp("trl"), TRL)


@pytest.fixture(scope="session")
def peft_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with PEFT; `MEGARL_GATE_PEFT` names the interpreter of one that is there already. Without it, the
    one that `MEGARL_GATE_TRL` names is used, if it has PEFT."""
    there = os.environ.get("MEGARL_GATE_PEFT")
    if there is not None:
        return Path(there)
    trls = os.environ.get("MEGARL_GATE_TRL")
    if trls is not None and subprocess.run([trls, "-c", "import peft"], capture_output=True).returncode == 0:
        return Path(trls)
    return _installed(tmp_path_factory.mktemp("peft"), *PEFT)


@pytest.fixture(scope="session")
def mcore_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the newest megatron-core that megarl runs on, which requires Python 3.12 but publishes wheels
    for 3.11 that work. `MEGARL_GATE_MCORE` names the interpreter of one that is there already.
    """
    there = os.environ.get("MEGARL_GATE_MCORE")
    if there is not None:
        return Path(there)
    python = _installed(tmp_path_factory.mktemp("mcore"), f"{ROOT}[dev]")
    late = ("--no-deps", "--ignore-requires-python", f"{PACKAGE}=={NEWEST}", "triton")
    install(python, *late)
    return python


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser without a window."""
    yield from started()


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core."""
    return source_of_axe(tmp_path_factory.mktemp("axe"))


def _installed(folder: Path, *requirements: str) -> Path:
    """The interpreter of a new environment with some packages; skips the test if they cannot be installed."""
    python = make_environment(folder / "venv")
    try:
        install(python, *requirements)
    except (AssertionError, subprocess.TimeoutExpired) as problem:
        pytest.skip(f"{requirements[0]} cannot be installed here: {str(problem)[-500:]}")
    return python
