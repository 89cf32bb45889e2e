"""The environments that several gates compare with."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.gates.environments import install, make_environment

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


def _installed(folder: Path, *requirements: str) -> Path:
    """The interpreter of a new environment with some packages; skips the test if they cannot be installed."""
    python = make_environment(folder / "venv")
    try:
        install(python, *requirements)
    except (AssertionError, subprocess.TimeoutExpired) as problem:
        pytest.skip(f"{requirements[0]} cannot be installed here: {str(problem)[-500:]}")
    return python
