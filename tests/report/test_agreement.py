"""The page of a self-test: the verdict, and differences beside their tolerances."""

from __future__ import annotations

import math

from megarl.report.agreement import Agreement, agreement_page
from tests.report.parsed import Element, parse
from tests.report.test_page import check_references

SAME = Agreement([1.0, 2.0], [1.0, 2.000001], [1e-5, 2e-5], "step")
APART = Agreement([1.0, 2.0, 3.0], [1.1, math.nan, 3.0], [1e-5, 1e-5, 1e-5], "token")


def parsed(**found: Agreement) -> Element:
    tree = parse(agreement_page("tp2 pp1 dp1", [("tp", "2")], found))
    check_references(tree)
    return tree


def test_differences_stand_beside_their_tolerances() -> None:
    tree = parsed(loss=SAME)
    assert "The layout gives the same numbers." in tree.all("header")[0].text()
    (row,) = tree.all(id="differences")[0].all("table")[0].all("tbody")[0].all("tr")
    assert [cell.text() for cell in row.children] == ["loss", "2", "1.0e-06", "2.0e-05", "same"]
    figure = tree.all("figure")[0]
    assert len(figure.with_class("f0")) == 3  # the key, and a dot for each
    last = figure.all("tbody")[0].all("tr")[-1]
    assert [cell.text() for cell in last.children] == ["1", "2", "2.000001", "1.0e-06", "2.0e-05"]


def test_what_differs_or_is_not_finite_is_said() -> None:
    tree = parsed(loss=SAME, logprobs=APART)
    assert "DIFFERENT" in tree.all("header")[0].text()
    verdicts = [row.children[-1].text() for row in tree.all(id="differences")[0].all("tbody")[0].all("tr")]
    assert verdicts == ["same", "DIFFERENT"]
    figure = tree.all("figure")[1]
    assert "1 of the values are not finite" in figure.text()
    assert len(figure.with_class("f1")) == 1
