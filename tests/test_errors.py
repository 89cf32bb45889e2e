"""Errors keep their data where they are placed in another, and where they travel to another process."""

import pickle
from typing import Any

import pytest

from megarl.config.offers import Refusal
from megarl.errors import DataError, first_line


def test_a_location_is_put_in_front_and_the_data_stay() -> None:
    value: Any = object()
    inner = DataError("key 'a' is wrong", key="a", value=value, where="turn 2", offers={"a": [1]})
    outer = inner.within("file.jsonl:3")
    assert str(outer) == "file.jsonl:3: key 'a' is wrong"
    assert (outer.key, outer.where, outer.offers) == ("a", "file.jsonl:3: turn 2", {"a": [1]})
    assert outer.value is value
    assert str(inner) == "key 'a' is wrong"


def test_errors_travel_with_their_data() -> None:
    sent = Refusal("a=1 is wrong", {"a": [2]}, "another a", key="a", value=1)
    found = pickle.loads(pickle.dumps(sent))
    assert type(found) is Refusal
    assert (str(found), found.key, found.value, found.offers) == ("a=1 is wrong", "a", 1, {"a": [2]})
    assert (found.problem, found.otherwise) == (sent.problem, sent.otherwise)


@pytest.mark.parametrize("value", [lambda: 1, "x" * 20_000], ids=["no pickle", "large"])
def test_of_a_value_that_cannot_travel_the_text_does(value: Any) -> None:
    found = pickle.loads(pickle.dumps(DataError("a is wrong", key="a", value=value)))
    assert str(found) == "a is wrong"
    assert found.value == repr(value)[:200]


@pytest.mark.parametrize(
    ("error", "line", "with_kind"),
    [
        (ValueError("\n  one\ntwo"), "one", "ValueError: one"),
        (KeyError(), "KeyError", "KeyError"),
        (OSError(" \n"), "OSError", "OSError"),
    ],
)
def test_the_first_line_of_an_exception(error: Exception, line: str, with_kind: str) -> None:
    assert first_line(error) == line
    assert first_line(error, kind=True) == with_kind
