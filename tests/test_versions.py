"""The versions that `make venv` installs: all that CI had, but nothing that an interpreter with torch already has."""

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.versions import constraints, installed_versions, normal, read_lock

ROOT = Path(__file__).resolve().parents[1]
LOCK = "# for CI, on Python 3.11: made by `make lock`\nnumpy==2.4.6\nPyYAML==6.0.4\ntorch==2.13.0\n"


def test_a_bare_interpreter_of_the_locks_python_gets_every_pin() -> None:
    assert constraints(LOCK, "3.11", {"pip": "26.0"}) == ["numpy==2.4.6", "PyYAML==6.0.4", "torch==2.13.0"]


def test_another_python_gets_the_pin_of_torch_alone() -> None:
    assert constraints(LOCK, "3.10", {}) == ["torch==2.13.0"]


def test_what_came_with_an_installed_torch_is_left_alone() -> None:
    installed = {"torch": "2.9.1+cu130", "numpy": "1.26.4", "pip": "26.0"}
    assert sorted(constraints(LOCK, "3.11", installed)) == ["PyYAML==6.0.4", "numpy==1.26.4", "torch==2.9.1"]
    assert sorted(constraints(LOCK, "3.12", installed)) == ["numpy==1.26.4", "torch==2.9.1"]


def test_beside_an_installed_torch_a_package_may_become_newer_but_not_older() -> None:
    """What another package requires may be newer than the machine's: kept exactly, nothing could be installed."""
    installed = {"torch": "2.9.1", "pyyaml": "6.0.1"}
    assert sorted(constraints(LOCK, "3.12", installed)) == ["pyyaml>=6.0.1", "torch==2.9.1"]


def test_pins_asked_for_by_name_hold_on_every_python_unless_installed() -> None:
    assert sorted(constraints(LOCK, "3.12", {"torch": "2.9.1"}, ["pyyaml"])) == ["PyYAML==6.0.4", "torch==2.9.1"]
    found = constraints(LOCK, "3.12", {"torch": "2.9.1", "pyyaml": "6.0.1"}, ["pyyaml"])
    assert sorted(found) == ["pyyaml>=6.0.1", "torch==2.9.1"]


def test_of_a_package_installed_twice_the_imported_version_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("first", "6.0.4"), ("second", "5.0")):
        info = tmp_path / folder / f"PyYAML-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: PyYAML\nVersion: {version}\n")
    (tmp_path / "second" / "removed-1.0.dist-info").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert installed_versions() == {"pyyaml": "6.0.4"}


def test_the_lock_has_every_requirement_of_pyproject() -> None:
    """A dependency that came without `make lock` would have no version of its own in a fresh clone."""
    _, pins = read_lock((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    wanted = [Requirement(text) for text in requires("megarl") or []]
    needed = [
        one.name
        for one in wanted
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("dev", "docs"))
    ]
    assert len(needed) > 20
    assert {normal(name) for name in needed} <= set(pins)
