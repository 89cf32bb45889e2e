"""The command line of the suite."""

import pytest

from megarl.conformance.settings import Suite
from megarl.errors import ConfigError
from megarl.selftest import Settings, parse
from tests.refusals import refused


def test_all_asks_for_the_suite_wherever_it_stands() -> None:
    assert parse(["--all"]) == Suite()
    assert parse(["only=cp,tp,cp", "--all", "steps=2", "limit=9"]) == Suite(only=("cp", "tp"), steps=2, limit=9)
    assert isinstance(parse(["tp=2"]), Settings)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("only=tp,pq", "only", "pq"),
        ("only=", "only", ""),
        ("steps=0", "steps", "0"),
        ("limit=soon", "limit", "soon"),
        ("html=", "html", ""),
    ],
)
def test_an_invalid_value_is_refused(word: str, key: str, value: str) -> None:
    with refused(ConfigError, key=key, value=value):
        parse(["--all", word])


def test_settings_of_one_layout_are_none_of_the_suite() -> None:
    for word in ("tp=2", "precision=bf16", "help"):
        with refused(ConfigError, key=word):
            parse(["--all", word])
