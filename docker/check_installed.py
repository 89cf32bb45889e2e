"""Check a package by its metadata alone: its version, and that what it requires is installed in admitted versions.

    python check_installed.py transformer-engine==2.11.0 torch

`torch` here is a package that it must require. `docker build` has no driver, without which a package that is linked
against it cannot be imported.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def problem_of(wanted: Requirement) -> str | None:
    """Return why a requirement is not met, or None where it is."""
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted} is required and not installed"
    # NGC's torch is a pre-release.
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted} is required, {wanted.name} {found} is installed"


def problems(package: Requirement, needed: list[str]) -> list[str]:
    """Return why a package cannot run here: requirements of its own, and those named, that are not met."""
    if absent := problem_of(package):
        return [absent]
    required = [Requirement(text) for text in requires(package.name) or []]
    required = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    lacking = sorted(set(needed) - {one.name for one in required})
    found = [f"{package} does not require {name}: it was built without it" for name in lacking]
    return found + [text for text in map(problem_of, required) if text]


if __name__ == "__main__":
    sys.exit("\n".join(problems(Requirement(sys.argv[1]), sys.argv[2:])) or 0)
