"""Names of reward functions: found without running the user's code, or refused in one clear line."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megarl.errors import ConfigError
from megarl.rewards import resolve

Write = Callable[..., Path]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module of a package `judges` that can be imported."""

    def write(text: str, name: str = "judges/own.py") -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
        return file

    monkeypatch.syspath_prepend(tmp_path)
    return write


def refusal(spec: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(spec)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_checked_without_running_the_module(package: Write) -> None:
    package("raise SystemExit('this must not run here')\ndef score(**_): ...\n")
    assert resolve("judges.own:score").source == "judges.own:score"
    assert "judges" not in sys.modules


def test_a_file_is_known_by_its_whole_path(package: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = package("def score(**_): ...\n")
    monkeypatch.chdir(file.parent)
    found = resolve("own.py:score")
    assert (found.name, found.source) == ("own.py:score", f"{file}:score")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("score = lambda **_: []", "score"),
        ("from json import loads as score", "score"),
        ("import os.path", "os.path.exists"),
        ("try:\n    import fast\nexcept ImportError:\n    def score(**_): ...", "score"),
        ("class Judge:\n    @staticmethod\n    def score(**_): ...", "Judge.score"),
        ("a, (b, score) = 1, (2, print)", "score"),
        ("from json import *", "loads"),
        ("def __getattr__(name): return print", "anything"),
        ("globals()['sco' + 're'] = print", "score"),
    ],
)
def test_a_name_may_be_bound_in_any_way(package: Write, text: str, name: str) -> None:
    file = package(text)
    resolve(f"judges.own:{name}")
    resolve(f"{file}:{name}")


def test_a_missing_function_names_the_nearest(package: Write) -> None:
    file = package("def score_walks(**_): ...\ndef other(**_):\n    def inner(): ...\n")
    assert refusal("judges.own:score_walk") == (
        f"reward.fn=judges.own:score_walk: {file} defines no score_walk; did you mean score_walks?"
    )
    assert refusal("judges.own:zzz").endswith("it defines score_walks, other")
    assert "defines no inner" in refusal(f"{file}:inner")


def test_a_missing_module_file_or_package_part_is_named(package: Write, tmp_path: Path) -> None:
    package("def score(**_): ...\n")
    assert "there is no module jugdes;" in refusal("jugdes.own:score")
    assert "there is no module judges.mine in the package judges" in refusal("judges.mine:score")
    assert "judges.own is a module, not a package" in refusal("judges.own.score:score")
    assert f"there is no file {tmp_path}/none.py" in refusal(f"{tmp_path}/none.py:score")


def test_a_broken_file_is_named_with_its_line(package: Write) -> None:
    file = package("x = 1\ndef score(:\n")
    assert f"{file}:2 is not valid Python" in refusal("judges.own:score")


@pytest.mark.parametrize("spec", ["score", "judges.own", ":score", "judges.own:", "judges.own:sc ore", "own.py"])
def test_a_spec_without_module_and_function_says_how_to_write_one(spec: str) -> None:
    assert "write package.module:function or path/to/file.py:function" in refusal(spec)


def test_a_callable_is_named_after_its_function() -> None:
    assert resolve(partial(partial(str.split, "a"), "b")).name == "str.split"
    assert resolve(refusal).name == "tests.rewards.test_functions:refusal"


def test_what_cannot_travel_or_is_no_function_is_refused() -> None:
    lock = threading.Lock()

    def locked(**_: object) -> list[float]:
        with lock:
            return []

    assert "cannot be sent to the process that runs it (TypeError: cannot pickle" in refusal(locked)
    assert "reward.fn is a int: give a function" in refusal(3)


def test_the_key_is_the_callers() -> None:
    with pytest.raises(ConfigError, match=r"^metric\.fn=nothing names no function"):
        resolve("nothing", key="metric.fn")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-of-this-name/rewards", "half\ud800"])
def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there(name: str) -> None:
    assert "there is no file" in refusal(f"./{name}.py:score" if name[0] != "~" else f"{name}.py:score")


@pytest.mark.parametrize("text", ["x = " + "-" * 100_000 + "1", "x = " + "(" * 5_000 + ")" * 5_000])
def test_a_file_that_is_nested_too_deep_for_pythons_parser_is_refused(text: str, package: Write) -> None:
    file = package(text)
    assert str(file) in refusal(f"{file}:score")
