"""The page of a comparison: its numbers, its curves over the seeds, and runs without curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.report.differences import Measured, differences_page
from tests.report.made_up import made_up, rows, settings, write_run
from tests.report.parsed import Element, parse
from tests.report.test_page import HOSTILE, check_references

LOSS = Measured((1.0, 2.0), (1.5, 3.5), 1.0, (0.25, 1.75), "differs")
OTHER = Measured((1.0, 2.0), (1.0, 2.0), 0.0, (0.0, 0.0), "equal")


@pytest.fixture
def runs(tmp_path: Path) -> list[list[Path]]:
    """Runs of two sides with two seeds; B's values are higher by 10, and the second seed's by 2."""
    return [
        [
            write_run(
                tmp_path / f"{side}{seed}",
                made_up(
                    4, rows=rows(4, ("train/loss",), shift=shift + 2 * seed), config=settings(optim__lr=shift + 0.5)
                ),
            )
            for seed in (0, 1)
        ]
        for side, shift in (("a", 0.0), ("b", 10.0))
    ]


def parsed(runs: list[list[Path]], names: tuple[str, str] = ("lr=1", "lr=2")) -> Element:
    tree = parse(differences_page(names, [1, 2], {"train/loss": LOSS, "eval/loss": OTHER}, "paired", runs))
    check_references(tree)
    return tree


def test_each_metric_has_its_difference_with_the_interval_and_its_values_by_seed(runs: list[list[Path]]) -> None:
    tree = parsed(runs)
    assert "train/loss: differs" in tree.all("header")[0].text()
    means = tree.all(id="differences")[0].all("table")[0].all("tbody")[0]
    assert [[cell.text() for cell in row.children] for row in means.all("tr")] == [
        ["train/loss", "1.5", "2.5", "1", "0.25 to 1.75", "differs"],
        ["eval/loss", "1.5", "1.5", "0", "0 to 0", "equal"],
    ]
    figure = tree.all("figure", id="difference-train-loss")[0]
    assert [each.text() for each in figure.all("desc")] == [
        "Mean 1, interval 0.25 to 1.75. Values: 0.5, 1.5.",
        "seed 1: A 1, B 1.5. seed 2: A 2, B 3.5.",
    ]


def test_curves_are_means_over_the_seeds_with_the_range_of_all(runs: list[list[Path]]) -> None:
    tree = parsed(runs)
    curve = tree.all("figure", id="metric-train-loss")[0]
    first = rows(1, ("train/loss",))[0]["train/loss"]
    values = curve.all("tbody")[0].all("tr")[0].children
    assert [float(cell.text()) for cell in values[1:]] == pytest.approx([first + 1, first + 11], rel=1e-3)
    assert [each.attributes["class"] for each in curve.with_class("spread")] == ["spread f0", "spread f1"]
    assert "optim.lr" in tree.all(id="settings")[0].text()


def test_one_seed_has_no_interval_and_runs_without_metrics_no_curves(tmp_path: Path) -> None:
    one = Measured((1.0,), (2.0,), 1.0, None, "differs")
    tree = parse(
        differences_page((HOSTILE, "b"), [1], {HOSTILE: one}, "one seed", [[tmp_path / "a"], [tmp_path / "b"]])
    )
    check_references(tree)
    assert "without an interval" in tree.all("desc")[0].text()
    assert "There are no curves" in tree.all(id="curves")[0].text()
    assert not tree.all("img")
