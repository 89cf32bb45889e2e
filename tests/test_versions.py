"""The versions that `make venv` installs: all that CI had, but nothing that an interpreter with torch already has."""

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from tools.versions import constraints, normal, read_lock

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


def test_the_lock_has_every_requirement_of_pyproject() -> None:
    """A dependency that came without `make lock` would have no version of its own in a fresh clone."""
    _, pins = read_lock((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    wanted = [Requirement(text) for text in requires("megarl") or []]
    needed = [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": "dev"})]
    assert len(needed) > 20
    assert {normal(name) for name in needed} <= set(pins)
