"""The suite passes on the newest of every dependency, and on the oldest that pyproject.toml allows."""

import re
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

from tests.gates.environments import ROOT, install, make_environment, run


def floors() -> list[str]:
    """The lowest version of each dependency that names one, torch apart: another build of it would be fetched."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for text in project["dependencies"]:
        requirement = Requirement(text)
        lowest = [one.version for one in requirement.specifier if one.operator == ">="]
        if lowest and requirement.name != "torch":
            first = lowest[0] + ".0" * (1 - lowest[0].count("."))
            found.append(f"{requirement.name}=={first}" + ("" if first.count(".") == 2 else ".*"))
    return found


ENDS = {"oldest": floors(), "newest": []}


@pytest.mark.gate
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize("end", ENDS)
def test_the_suite_passes_with_the_ends_of_the_supported_versions(end: str, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    install(python, "-e", f"{ROOT}[dev]", constraints=ENDS[end])
    listed = run(python, "-m", "pip", "freeze", cwd=ROOT, timeout=300).stdout.lower().replace("_", "-")
    for pin in ENDS[end]:
        name, _, version = pin.partition("==")
        assert re.search(rf"^{name}=={re.escape(version.removesuffix('*'))}", listed, re.MULTILINE), (pin, listed)
    passed = run(
        *(python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"),
        *("--basetemp", tmp_path / "runs"),
        cwd=ROOT,
        timeout=5400,
    )
    assert " passed" in passed.stdout
