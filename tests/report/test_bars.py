"""Bars: lengths in proportion, one colour for a name, and what a reader is told."""

from __future__ import annotations

import pytest

from megarl.report.bars import Bar, Span, gantt, legend, stacked_bars
from tests.report.parsed import Element, parse

COLOURS = ("weights", "cache", "logits")
BARS = [Bar("generate", {"weights": 2.0, "cache": 1.0, "logits": 0.0}), Bar("train", {"weights": 2.0, "logits": 2.0})]


def place(element: Element) -> tuple[float, float]:
    """Where a rectangle begins and how wide it is."""
    return float(element.attributes["x"] or 0), float(element.attributes["width"] or 0)


def test_parts_are_as_long_as_they_are_large_and_stand_one_behind_the_other() -> None:
    svg = parse(stacked_bars("a", "Memory", "GB", BARS, COLOURS, {"usable": 8.0}))
    weights, cache, weights_2, logits = svg.with_class("part")  # what is 0 is not drawn
    left, unit = place(weights)[0], place(weights)[1] / 2
    assert place(cache) == pytest.approx((left + 2 * unit, unit), abs=0.1)
    assert place(weights_2) == pytest.approx((left, 2 * unit), abs=0.1)
    assert place(logits) == pytest.approx((left + 2 * unit, 2 * unit), abs=0.1)
    (limit,) = svg.with_class("limit")
    assert float((limit.attributes["d"] or "")[1:].split()[0]) == pytest.approx(left + 8 * unit, abs=0.1)


def test_a_name_has_its_colour_in_every_bar_and_in_the_legend() -> None:
    svg = parse(stacked_bars("a", "Memory", "GB", BARS, COLOURS))
    classes = [part.attributes["class"] for part in svg.with_class("part")]
    assert classes == ["part f0", "part f1", "part f0", "part f2"]
    entries = parse(legend(COLOURS, ["usable"], there={"weights", "logits"})).all("li")
    assert [entry.text() for entry in entries] == ["weights", "logits", "usable"]
    assert [entry.all("rect")[0].attributes["class"] for entry in entries[:2]] == ["part f0", "part f2"]


def test_bars_are_told_in_words() -> None:
    svg = parse(stacked_bars("a", "Memory", "GB", BARS, COLOURS, {"usable": 8.0}))
    said = svg.all("desc")[0].text()
    assert said == "generate: 3 GB (weights 2, cache 1). train: 4 GB (weights 2, logits 2). usable: 8 GB."
    assert "train, logits: 2 GB" in [title.text() for title in svg.all("title")]


def test_bars_of_nothing_are_drawn_too() -> None:
    assert not parse(stacked_bars("a", "t", "GB", [Bar("save", {"weights": 0.0})], COLOURS)).with_class("part")


def test_spans_lie_where_they_happen_and_are_named_where_there_is_room() -> None:
    lanes = [
        ("stage 0", [Span(0.0, 1.0, 0, "0", "first"), Span(2.0, 4.0, 1, "0", "second", low=True)]),
        ("stage 1", [Span(1.0, 1.01, 0, "long name", "short one")]),
    ]
    tree = parse(gantt("a", "Passes", "in words", lanes, (1000.0, "milliseconds")))
    first, second, short = tree.with_class("part")
    left, unit = place(first)
    assert place(second) == pytest.approx((left + 2 * unit, 2 * unit), abs=0.1)
    assert place(short)[0] == pytest.approx(left + unit, abs=0.1)
    assert float(second.attributes["height"] or 0) < float(first.attributes["height"] or 0)
    assert float(short.attributes["y"] or 0) > float(first.attributes["y"] or 0)
    assert [each.text() for each in tree.with_class("inside")] == ["0", "0"]
    assert [each.all("title")[0].text() for each in (first, second, short)] == ["first", "second", "short one"]
    assert {"4000", "stage 1", "milliseconds"} <= {each.text() for each in tree.with_class("tick")}
    assert tree.all("desc")[0].text() == "in words"
    assert tree.with_class("wide")[0].attributes["data-label"] == "Passes"
