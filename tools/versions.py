"""The versions that `make` installs: `constraints.txt` has an exact one for every package, as CI ran with them.

    python tools/versions.py constrain FILE   # write what holds for this interpreter
    python tools/versions.py lock             # renew constraints.txt: the newest of everything, in a fresh environment

Those who `pip install megarl` get the ranges of pyproject.toml instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
HEADER = """\
# What CI runs with, on Python {python}. `make lock` makes this file; `make venv` and the images install it.
"""


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(text: str) -> tuple[str, dict[str, str]]:
    """The Python version that a lock is for, and its lines by package."""
    python = re.search(r"on Python (\d+\.\d+)", text)
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    return python.group(1) if python else "", {normal(line.partition("==")[0]): line for line in pins}


def constraints(text: str, python: str, installed: dict[str, str]) -> list[str]:
    """The pins that hold for an interpreter.

    What an interpreter with torch already has (a GPU machine's, an image's) is left as it is. Pins were tried on one
    Python version: another one takes torch's alone, as the newest of a package may not exist for it.
    """
    made_on, pins = read_lock(text)
    if "torch" in installed:
        kept = [f"{name}=={version.partition('+')[0]}" for name, version in installed.items() if name in pins]
        return kept + ([line for name, line in pins.items() if name not in installed] if python == made_on else [])
    return list(pins.values()) if python == made_on else [pins["torch"]]


def lock() -> None:
    """Install the newest of everything in a fresh environment, and write down what that was."""
    torch = read_lock(LOCK.read_text(encoding="utf-8"))[1]["torch"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
        wanted = os.environ.get("TORCH", torch)
        subprocess.run(
            [*pip, "install", "-q", wanted, *os.environ.get("TORCH_INDEX", "").split()], check=True, env=environment
        )
        subprocess.run([*pip, "install", "-q", wanted, f"{ROOT}[dev]"], check=True, env=environment)
        listed = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    pins = [line.partition("+")[0] for line in listed.splitlines() if "==" in line]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    LOCK.write_text(HEADER.format(python=python) + "".join(f"{pin}\n" for pin in pins), encoding="utf-8")


def main() -> None:
    if sys.argv[1:2] == ["constrain"]:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        installed = {normal(one.metadata["Name"]): one.version for one in distributions()}
        pins = constraints(LOCK.read_text(encoding="utf-8"), python, installed)
        Path(sys.argv[2]).write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
    elif sys.argv[1:] == ["lock"]:
        lock()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
