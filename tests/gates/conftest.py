"""The environment that several gates compare with."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.gates.environments import install, make_environment

TRL = "trl==1.16.0"


@pytest.fixture(scope="session")
def trl_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with TRL; `MEGARL_GATE_TRL` names the interpreter of one that is there already."""
    there = os.environ.get("MEGARL_GATE_TRL")
    if there is not None:
        return Path(there)
    python = make_environment(tmp_path_factory.mktemp("trl") / "venv")
    try:
        install(python, TRL)
    except (AssertionError, subprocess.TimeoutExpired) as problem:
        pytest.skip(f"{TRL} cannot be installed here: {str(problem)[-500:]}")
    return python
