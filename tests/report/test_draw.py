"""Drawing: which points are kept, where they are drawn, and what a reader is told of them."""

from __future__ import annotations

import json
import math

import pytest

from megarl.command import printable
from megarl.report.draw import BOTTOM, LEFT, RIGHT, TOP, Chart, Line, heatmap, means, thin, ticks
from tests.report.parsed import Element, parse


def chart(*lines: Line, bands: tuple[tuple[int, int], ...] = ()) -> Chart:
    return Chart("a", "a title", "phase", lines, bands)


def path_of(svg: Element) -> list[tuple[float, float]]:
    (path,) = svg.with_class("line")
    steps = (path.attributes["d"] or "").replace("M", "L").split("L")[1:]
    return [(float(step.split()[0]), float(step.split()[1])) for step in steps]


def test_points_that_are_thinned_keep_the_ends_and_every_peak() -> None:
    points = [(step, math.sin(step / 50)) for step in range(10_000)]
    points[4321], points[8765] = (4321, 9.0), (8765, -9.0)
    kept = thin(points, 100)
    assert len(kept) <= 100
    assert {points[0], points[4321], points[8765], points[-1]} <= set(kept)
    assert kept == sorted(kept)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7])
def test_few_points_are_all_kept(count: int) -> None:
    points = [(step, 1.0) for step in range(count)]
    assert thin(points, max(count, 4)) == points


def test_means_are_of_equal_parts_and_stand_at_their_ends() -> None:
    assert means([(1, 1.0), (2, 3.0), (5, 5.0), (6, 9.0)], 2) == [(2, 2.0), (6, 7.0)]
    assert means([(3, 4.0)], 10) == [(3, 4.0)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.0, 0.9, [0.0, 0.5]),
        (-3.0, 3.0, [-2.0, 0.0, 2.0]),
        (1.0, 100.0, [50.0, 100.0]),
        (5.0, 5.0, [5.0]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 4) == pytest.approx(expected)


def test_a_line_goes_through_its_values_inside_the_axes() -> None:
    svg = parse(chart(Line("a", [(10, 0.0), (15, 1.0), (20, 0.5)])).svg())
    (x0, y0), (x1, y1), (x2, y2) = path_of(svg)
    assert (x0, x1, x2) == pytest.approx((LEFT, (LEFT + RIGHT) / 2, RIGHT))
    assert TOP < y1 < y2 < y0 < BOTTOM
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


@pytest.mark.parametrize("value", [0.0, 1e-300, -5e-324, 3.0, 1e300, -1.7e308])
def test_equal_and_extreme_values_are_drawn_inside_the_axes(value: float) -> None:
    for points in ([(0, value)], [(0, value), (1, value)], [(0, value), (1, -value)]):
        found = path_of(parse(chart(Line("a", points)).svg()))
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in found)
        json.loads(parse(chart(Line("a", points)).data()).text(), parse_constant=pytest.fail)


def test_the_text_in_a_drawing_is_escaped() -> None:
    hostile = '</script></svg><img src=x onerror="x">\x1b[2J'
    drawing = Chart("a", hostile, hostile, [Line(hostile, [(0, 1.0), (1, 2.0)])])
    svg, data = parse(drawing.svg()), parse(drawing.data())
    assert not svg.all("img")
    assert svg.all("title")[0].text().endswith('onerror="x">\\x1b[2J')
    assert [element.tag for element in data.children] == ["script"]
    assert json.loads(data.text())["lines"][0]["label"] == printable(hostile)


def test_a_drawing_says_in_words_what_it_shows() -> None:
    svg = parse(chart(Line("a", [(1, 0.5), (2, 9.0), (3, 0.25)]), Line("b", [])).svg())
    said = svg.all("desc")[0].text()
    assert "a: 0.5 at phase 1, 0.25 at phase 3, lowest 0.25 at 3, highest 9 at 2." in said
    assert "b: no values." in said


def test_what_the_script_reads_has_the_drawn_points_and_the_means_of_all() -> None:
    points = [(step, float(step % 10)) for step in range(5_000)]
    content = json.loads(parse(chart(Line("a", points)).data()).text())
    (line,) = content["lines"]
    assert len(line["points"]) <= 400
    assert line["points"][-1] == [4999, 9.0]
    assert len(line["means"]) <= 200
    assert sum(value for _, value in line["means"]) / len(line["means"]) == pytest.approx(4.5, abs=0.01)
    assert content["xSpan"] == [0, 4999]


def test_the_span_of_a_finding_is_shaded() -> None:
    (band,) = parse(chart(Line("a", [(0, 0.0), (10, 1.0)]), bands=((5, 20),)).svg()).with_class("band")
    assert float(band.attributes["x"] or 0) == pytest.approx((LEFT + RIGHT) / 2)
    assert float(band.attributes["x"] or 0) + float(band.attributes["width"] or 0) == pytest.approx(RIGHT)


def test_a_distribution_has_a_column_for_each_phase_and_darker_fields_for_more_responses() -> None:
    svg = parse(heatmap("a", "t", "d", "phase", [(3, [0.0, 0.0, 0.0, 1.0]), (4, [1.0])]))
    fields = svg.with_class("cell")
    at = sorted((float(each.attributes["x"] or 0), float(each.attributes["fill-opacity"] or 0)) for each in fields)
    middle = (LEFT + RIGHT) / 2
    assert at == [(LEFT, pytest.approx(0.34)), (LEFT, pytest.approx(0.78)), (middle, 1.0)]
