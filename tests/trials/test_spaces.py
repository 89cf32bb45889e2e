"""What a sweep varies: distributions as they are written, and values as points."""

import random

import pytest

from megarl.errors import ConfigError
from megarl.trials.spaces import Space, grid, parse_space, split_choices
from tests.refusals import refused


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("choice(1, 2,3)", Space("k", "choice", ("1", "2", "3"))),
        ("choice([a,b],'x,y',{c:1})", Space("k", "choice", ("[a,b]", "'x,y'", "{c:1}"))),
        (" loguniform( 1e-5 , 1e-3 ) ", Space("k", "loguniform", low=1e-5, high=1e-3)),
        ("uniform(-1,1)", Space("k", "uniform", low=-1.0, high=1.0)),
        ("int(1,8)", Space("k", "int", low=1.0, high=8.0)),
    ],
)
def test_a_distribution_is_read(text: str, space: Space) -> None:
    assert parse_space("k", text) == space


@pytest.mark.parametrize(
    "text",
    ["1e-3", "normal(0,1)", "choice()", "choice(1,1)", "uniform(1)", "uniform(2,1)", "uniform(1,1)", "uniform(a,b)",
     "loguniform(0,1)", "logint(0,4)", "int(1,2.5)", "uniform(0,inf)", "uniform(nan,1)", "choice(1", ""],
)  # fmt: skip
def test_what_is_no_distribution_is_refused_with_its_key(text: str) -> None:
    with refused(ConfigError, key="sweep.optim.lr", value=text):
        parse_space("optim.lr", text)


@pytest.mark.parametrize(
    "space",
    [
        Space("k", "choice", ("a", "b", "c")),
        Space("k", "uniform", low=-2, high=5),
        Space("k", "loguniform", low=1e-5, high=1e-1),
        Space("k", "int", low=1, high=4),
        Space("k", "logint", low=16, high=1024),
    ],
)
def test_a_value_has_a_point_whose_value_it_is(space: Space) -> None:
    draw = random.Random(0)
    for point in [0.0, 1.0, *(draw.random() for _ in range(100))]:
        value = space.value(point)
        assert space.value(space.point(value)) == value
        if space.kind != "choice":
            assert space.low - 1e-9 <= float(value) <= space.high + 1e-9


def test_integers_and_choices_have_equal_shares() -> None:
    points = [(index + 0.5) / 1000 for index in range(1000)]
    for space in (Space("k", "int", low=1, high=4), Space("k", "choice", ("1", "2", "3", "4"))):
        values = [space.value(point) for point in points]
        assert [values.count(str(number)) for number in (1, 2, 3, 4)] == [250] * 4


def test_loguniform_has_equal_shares_per_decade() -> None:
    values = [float(Space("k", "loguniform", low=1e-4, high=1e-2).value((i + 0.5) / 100)) for i in range(100)]
    assert sum(value < 1e-3 for value in values) == 50


def test_a_grid_combines_all_values() -> None:
    spaces = [parse_space("a", "choice(x,y)"), parse_space("b", "loguniform(1e-4,1e-2)"), parse_space("c", "int(1,2)")]
    found = list(grid(spaces, 3))
    assert len(found) == 2 * 3 * 2
    assert found[0] == {"a": "x", "b": "0.0001", "c": "1"}
    assert {one["b"] for one in found} == {"0.0001", "0.001", "0.01"}


def test_commas_inside_brackets_and_quotes_do_not_split() -> None:
    assert split_choices("[1,[2,3]], 'a,b', c") == ["[1,[2,3]]", "'a,b'", "c"]
