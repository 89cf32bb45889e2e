"""Layouts, resumes, generation and whole runs once more, on a CPU with a GPU's settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.parallel.device import VARIABLE

pytestmark = pytest.mark.gate
ROOT = Path(__file__).parents[2]
FLOORS = ("parallel", "rollout", "models", "experience", "modules", "e2e", "test_checkpoint.py")


@pytest.mark.parametrize("floor", FLOORS)
def test_the_tests_of_a_floor_pass_with_a_gpus_settings(floor: str) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{floor}"]
    environ = {**os.environ, VARIABLE: "1"}
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
