"""`python -m benchmarks.gpu --small`: all that is to be tried on a GPU, on a CPU with a GPU's settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_parts import PARTS

pytestmark = pytest.mark.gate


def test_every_part_is_as_it_should_be(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["part"] for part in found] == list(PARTS)
    assert all(part["rows"] for part in found)
    assert "cpu_layers=off" in (tmp_path / "gpu.md").read_text()
