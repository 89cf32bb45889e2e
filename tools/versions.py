"""The versions that `make` installs: `constraints.txt` has an exact one for every package, as CI ran with them.

    python tools/versions.py constrain FILE [PACKAGE ...]   # write what holds for this interpreter
    python tools/versions.py lock   # renew constraints.txt: the newest of everything, in a fresh environment

The pin of a PACKAGE named after FILE holds on every Python, unless it is installed beside torch.

Those who `pip install megarl` get the ranges of pyproject.toml instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
# Other packages of a machine were built for exactly these.
COMPILED_AGAINST = ("torch", "numpy", "protobuf")
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


def constraints(text: str, python: str, installed: dict[str, str], always: Sequence[str] = ()) -> list[str]:
    """The pins that hold for an interpreter.

    What an interpreter with torch already has (a GPU machine's, an image's) is never replaced by an older version, and
    by a newer one only where another package requires it; COMPILED_AGAINST is never replaced. Pins were tried on one
    Python version: another one takes torch's and those of `always`, as the newest of a package may not exist for it.
    """
    made_on, pins = read_lock(text)
    found = installed if "torch" in installed else {}
    kept = [
        f"{name}{'==' if name in COMPILED_AGAINST else '>='}{version.partition('+')[0]}"
        for name, version in found.items()
        if name in pins
    ]
    return kept + [
        line
        for name, line in pins.items()
        if name not in found and (python == made_on or name == "torch" or name in always)
    ]


def installed_versions() -> dict[str, str]:
    """Versions by package. Of a package that is there twice, the one that is imported: the first on the path."""
    found: dict[str, str] = {}
    for one in distributions():
        try:
            name = one.metadata["Name"]
        except FileNotFoundError:  # of a leftover, where the package importlib_metadata looks
            continue
        if name:  # a leftover of a package that was removed has none
            found.setdefault(normal(name), one.version)
    return found


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
        subprocess.run([*pip, "install", "-q", wanted, f"{ROOT}[dev,docs]"], check=True, env=environment)
        listed = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    pins = [line.partition("+")[0] for line in listed.splitlines() if "==" in line]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    LOCK.write_text(HEADER.format(python=python) + "".join(f"{pin}\n" for pin in pins), encoding="utf-8")


def main() -> None:
    """Run the command that the arguments name."""
    if sys.argv[1:2] == ["constrain"]:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        always = [normal(name) for name in sys.argv[3:]]
        pins = constraints(LOCK.read_text(encoding="utf-8"), python, installed_versions(), always)
        Path(sys.argv[2]).write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
    elif sys.argv[1:] == ["lock"]:
        lock()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
