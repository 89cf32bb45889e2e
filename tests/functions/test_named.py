"""Names of functions: found without running the user's code, or refused in one clear line."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import ConfigError
from megarl.functions.named import check_options, check_spelling, data_source, resolve
from tests.refusals import refused

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


def assert_refused(name: str, **expected: Any) -> None:
    with refused(ConfigError, key="reward.fn", value=name, names=(f"reward.fn={name}",), **expected):
        resolve(name)


def score(**_: object) -> list[float]:
    return []


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

    def assert_offered(name: str, *offers: str) -> None:
        assert_refused(name, where=str(file), offers={"reward.fn": list(offers)})

    assert_offered("judges.own:score_walk", "judges.own:score_walks")
    assert_offered("judges.own:zzz", "judges.own:score_walks", "judges.own:other")
    assert_offered(f"{file}:inner", f"{file}:score_walks", f"{file}:other")


def test_a_file_without_a_function_offers_none(package: Write) -> None:
    file = package("x = 1\n")
    assert_refused("judges.own:score", where=str(file), offers={})


def test_a_missing_module_file_or_package_part_is_named(package: Write, tmp_path: Path) -> None:
    package("def score(**_): ...\n")
    for name, where in (
        ("jugdes.own:score", "jugdes"),
        ("judges.mine:score", "judges.mine"),
        ("judges.own.score:score", "judges.own"),
        (f"{tmp_path}/none.py:score", f"{tmp_path}/none.py"),
    ):
        assert_refused(name, where=where, offers={})


def test_a_broken_file_is_named_with_its_line(package: Write) -> None:
    file = package("x = 1\ndef score(:\n")
    assert_refused("judges.own:score", where=f"{file}:2")


@pytest.mark.parametrize("spec", ["score", "judges.own", ":score", "judges.own:", "judges.own:sc ore", "own.py"])
def test_a_spec_without_module_and_function_says_how_to_write_one(spec: str) -> None:
    with refused(ConfigError, key="reward.fn", value=spec, names=("package.module:function",)) as found:
        resolve(spec)
    assert found.error.where is None


def test_a_callable_is_named_after_its_function() -> None:
    assert resolve(partial(partial(str.split, "a"), "b")).name == "str.split"
    assert resolve(score).name == "tests.functions.test_named:score"


def test_what_cannot_travel_or_is_no_function_is_refused() -> None:
    lock = threading.Lock()

    def locked(**_: object) -> list[float]:
        with lock:
            return []

    name = f"{__name__}:{locked.__qualname__}"
    with refused(ConfigError, key="reward.fn", value=name, names=(name, "TypeError")):
        resolve(locked)
    with refused(ConfigError, key="reward.fn", value=None, names=("int",)):
        resolve(3)  # type: ignore[arg-type]


def test_the_key_is_the_callers() -> None:
    with refused(ConfigError, key="metric.fn", value="nothing", names=("metric.fn=nothing",)):
        resolve("nothing", key="metric.fn")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-of-this-name/rewards", "half\ud800"])
def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there(name: str) -> None:
    file = f"{name}.py" if name[0] == "~" else f"./{name}.py"
    assert_refused(f"{file}:score", where=str(Path(file).absolute()))


@pytest.mark.parametrize("text", ["x = " + "-" * 100_000 + "1", "x = " + "(" * 5_000 + ")" * 5_000])
def test_a_file_that_is_nested_too_deep_for_pythons_parser_is_refused(text: str, package: Write) -> None:
    file = package(text)
    with refused(ConfigError, key="reward.fn", value=f"{file}:score", offers={}) as found:
        resolve(f"{file}:score")
    assert found.error.where in (str(file), f"{file}:1")


# --- among sources of data --------------------------------------------------------------------------------------------


def test_a_function_among_sources_is_told_from_a_file_and_a_name_on_the_hub(
    package: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = package("def records(): ...\n")
    package("def records(): ...\n", "mine/tasks.py")
    (tmp_path / "alone.py").write_text("def records(): ...\n")
    (tmp_path / "judges.own:kept").write_text("a line")
    monkeypatch.chdir(tmp_path)
    for name in ("judges.own:records", f"{file}:records", "judges/own.py:records", "alone:records"):
        assert data_source(name, "data.train") is not None, name
    hub = ("squad", "owner/name", "owner/name:records", "glue:mrpc", "json:dumps_it", "math:algebra")
    for name in (*hub, "train.jsonl", "judges.own:kept", "a:b:c", "data/x.jsonl", "C:name-x"):
        assert data_source(name, "data.train") is None, name


@pytest.mark.parametrize("name", ["judges.own:recods", "judges.owm:records", "none.py:records", "own:recods"])
def test_a_misspelt_function_among_sources_is_refused(
    package: Write, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(package("def records(): ...\n").parent)
    with refused(ConfigError, key="clone.data", value=name):
        data_source(name, "clone.data")


def test_an_option_that_a_function_does_not_take_is_refused_without_running_it(package: Write) -> None:
    file = package(
        "from own import wrapped\nraise SystemExit\ndef one(seed=1, *, size=2): ...\ndef none(): ...\n"
        "def any(**_): ...\n@wrapped\ndef other(): ...\n"
    )

    def check(name: str, **options: object) -> None:
        check_options(resolve(f"{file}:{name}"), options, "data.options")

    check("one", seed=3, size=4)
    check("any", whatever=1)
    check("other", whatever=1)  # a decorator may take it
    with refused(ConfigError, key="data.options.sede", value=3, where=str(file), offers={"data.options": ["seed"]}):
        check("one", sede=3)
    with refused(ConfigError, key="data.options.x", value=3, where=str(file)):
        check("none", x=3)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tolerence", "tolerance"), ("feild", "field"), ("tolerance", None), ("answer", None), ("samples_of_mine", None)],
)
def test_options_that_look_like_one_are_refused_and_fields_of_records_are_not(name: str, meant: str | None) -> None:
    function = resolve("megarl.rewards.builtin:numeric_match")
    if meant is None:
        check_spelling(function, {name: 1}, "reward.options")
        return
    with refused(ConfigError, key=f"reward.options.{name}", value=1, offers={"reward.options": [meant]}):
        check_spelling(function, {name: 1}, "reward.options")
