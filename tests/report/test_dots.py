"""Dots: where values, intervals and limits are drawn, and what a reader is told of them."""

from __future__ import annotations

import math

import pytest

from megarl.report.dots import MOST_ROWS, interval_plot, limit_plot, pair_plot
from megarl.report.draw import BOTTOM
from tests.report.parsed import Element, parse


def at(element: Element, name: str = "cx") -> float:
    return float(element.attributes[name] or 0)


def test_an_interval_reaches_from_its_low_to_its_high_end_with_the_mean_and_zero_in_scale() -> None:
    svg = parse(interval_plot("a", "Difference", "B - A", 2.0, (1.0, 3.0), [1.0, 3.0]))
    (mean,) = svg.with_class("f0")
    first, second = svg.with_class("hollow")
    unit = (at(second) - at(first)) / 2
    assert at(mean) == pytest.approx(at(first) + unit, abs=0.2)
    zero = float((svg.with_class("zero")[0].attributes["d"] or "")[1:].split()[0])
    assert zero == pytest.approx(at(first) - unit, abs=0.2)
    reach = svg.with_class("reach")[0].attributes["d"] or ""
    low, high = reach[1:].split("M")[0].replace("H", " ").split()[::2]
    assert (float(low), float(high)) == pytest.approx((at(first), at(second)), abs=0.2)
    assert svg.all("desc")[0].text() == "Mean 2, interval 1 to 3. Values: 1, 3."


def test_one_value_has_no_interval() -> None:
    svg = parse(interval_plot("a", "Difference", "B - A", 0.0, None, [0.0]))
    assert not svg.with_class("reach")
    assert "without an interval" in svg.all("desc")[0].text()


def test_pairs_are_joined_row_by_row() -> None:
    svg = parse(pair_plot("a", "t", "loss", ("A", "B"), [("seed 1", 1.0, 2.0), ("seed 2", 3.0, 1.0)]))
    first, second = svg.with_class("f0"), svg.with_class("hollow")
    assert at(first[0]) == at(second[1]) < at(second[0]) < at(first[1])
    assert at(first[0], "cy") == at(second[0], "cy") < at(first[1], "cy")
    assert svg.all("desc")[0].text() == "seed 1: A 1, B 2. seed 2: A 3, B 1."
    many = parse(pair_plot("a", "t", "loss", ("A", "B"), [(str(row), 0.0, 1.0) for row in range(MOST_ROWS + 5)]))
    assert len(many.with_class("f0")) == MOST_ROWS


def test_values_and_limits_share_a_logarithmic_axis() -> None:
    svg = parse(limit_plot("a", "t", "step", [1e-7, 1e-6, 1e-4], [1e-5, 1e-5, 1e-5]))
    low, middle = svg.with_class("f0")
    (above,) = svg.with_class("f1")  # above its limit
    decade = at(low, "cy") - at(middle, "cy")
    assert decade > 0
    assert at(above, "cy") == pytest.approx(at(middle, "cy") - 2 * decade, abs=0.3)
    limit = float((svg.with_class("limit")[0].attributes["d"] or "").split("H")[0].split()[1])
    assert limit == pytest.approx(at(middle, "cy") - decade, abs=0.3)
    assert "the largest 0.0001" in svg.all("desc")[0].text()
    assert "1 are above their limit" in svg.all("desc")[0].text()


def test_zero_lies_on_the_axis_and_what_is_not_finite_is_left_out() -> None:
    svg = parse(limit_plot("a", "t", "step", [0.0, 1e-9, math.nan], [1e-5, 1e-5, 1e-5]))
    zero, small = svg.with_class("f0")
    assert at(zero, "cy") == BOTTOM > at(small, "cy")
    assert "0" in [each.text() for each in svg.with_class("tick")]
    assert not svg.with_class("f1")
    assert "1 are above their limit or not finite" in svg.all("desc")[0].text()
    assert parse(limit_plot("a", "t", "step", [0.0, 0.0], [1e-5, 1e-5])).with_class("f0")
