"""Fresh environments and clones for gates, and commands run in them with their output shown when they fail."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.docker.test_dockerfile import package
from tools.versions import normal

ROOT = Path(__file__).resolve().parents[2]


def run(
    *command: str | Path, cwd: Path, timeout: float, without: Sequence[str] = (), **environ: str
) -> "subprocess.CompletedProcess[str]":
    """A command that must succeed. `without` names variables of ours that it must not see."""
    kept = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV", *without}}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done


def make_environment(folder: Path) -> Path:
    """An environment that sees no package of ours; its interpreter."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent, timeout=300)
    return folder / "bin" / "python"


def make_environment_of(version: str, folder: Path, packages: Mapping[str, str]) -> Path:
    """An environment of another Python, as if some packages were in it: their metadata are. Its interpreter; skips the
    test where that Python is not installed."""
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version}")
    run(found, "-m", "venv", folder, cwd=folder.parent, timeout=300)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, release in packages.items():
        package(site, name, release)
    return folder / "bin" / "python"


def resolved(python: Path, *words: str | Path, without: Sequence[str] = ()) -> dict[str, str]:
    """What `pip install` with these words would install: versions by package."""
    install = ("-m", "pip", "install", "--dry-run", *words)
    told = run(python, *install, cwd=python.parent, timeout=1800, without=without).stdout
    (line,) = re.findall(r"^Would install (.*)", told, re.MULTILINE)
    return {normal(word.rpartition("-")[0]): word.rpartition("-")[2] for word in line.split()}


def install(python: Path, *requirements: str, constraints: Sequence[str] = (), timeout: float = 1800) -> None:
    """Install with this run's torch pinned, so that no other build of it is fetched."""
    pinned = python.parent.parent / "constraints.txt"
    torch = importlib.metadata.version("torch").split("+")[0]
    pinned.write_text("\n".join([f"torch=={torch}", *constraints]) + "\n")
    run(python, "-m", "pip", "install", "-q", *requirements, cwd=ROOT, timeout=timeout, PIP_CONSTRAINT=str(pinned))
