"""Confidence against accuracy: a model that is as sure as it is right has no error, and a surer one has."""

import csv
import math
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from megarl.experience.calibration import BINS, Calibration

SVG = "{http://www.w3.org/2000/svg}"


def pairs_of(probability: Tensor, right: Tensor) -> Tensor:
    """Leads of pairs in which the preferred response has this probability, and is the better one if `right`."""
    return torch.logit(probability) * torch.where(right, 1.0, -1.0)


def calibrated(count: int = 40_000) -> Tensor:
    dice = torch.Generator().manual_seed(0)
    probability = 0.5 + 0.5 * torch.rand(count, generator=dice, dtype=torch.float64)
    return pairs_of(probability, torch.rand(count, generator=dice, dtype=torch.float64) < probability)


def counted(lead: Tensor, weight: Tensor | None = None) -> Calibration:
    found = Calibration()
    found.add(lead, torch.ones_like(lead) if weight is None else weight)
    return found


def test_a_calibrated_model_has_almost_no_error_and_a_surer_one_has() -> None:
    lead = calibrated()
    assert counted(lead).error < 0.02
    assert counted(lead * 5).error > 0.1
    assert counted(lead / 5).error > 0.1


def test_the_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    right = torch.tensor([True, True, True, False])
    found = counted(pairs_of(torch.full((4,), 0.9, dtype=torch.float64), right))
    assert found.error == pytest.approx(0.9 - 0.75)
    sure = pairs_of(torch.full((4,), 0.52, dtype=torch.float64), torch.ones(4, dtype=torch.bool))
    found.add(sure, torch.full((4,), 0.5))
    assert found.error == pytest.approx((4 * 0.15 + 2 * 0.48) / 6)


def test_pairs_that_are_added_in_parts_count_as_all_at_once() -> None:
    lead = calibrated(1000)
    parts = Calibration()
    for some in lead.split(300):
        parts.add(some, torch.ones_like(some))
    assert parts.table() == counted(lead).table()


def test_equal_scores_are_half_right_and_certain_ones_are_in_the_last_bin() -> None:
    (one,) = counted(torch.zeros(3)).bins()
    assert (one.low, one.confidence, one.accuracy) == (0.5, 0.5, 0.5)
    (one,) = counted(torch.tensor([1e9, math.inf])).bins()
    assert (one.high, one.confidence, one.accuracy) == (pytest.approx(1.0), 1.0, 1.0)
    assert Calibration().error == 0


def test_the_table_is_read_as_csv_and_has_every_pair() -> None:
    rows = list(csv.DictReader(counted(calibrated()).table().splitlines()))
    assert len(rows) == BINS
    assert sum(float(row["pairs"]) for row in rows) == pytest.approx(40_000, rel=1e-4)
    for row in rows:
        assert float(row["from"]) <= float(row["confidence"]) <= float(row["to"])
        assert float(row["accuracy"]) == pytest.approx(float(row["confidence"]), abs=0.05)
    assert list(csv.DictReader(Calibration().table().splitlines())) == []


def test_the_plot_is_an_svg_with_a_dot_for_each_bin_within_its_frame() -> None:
    root = ElementTree.fromstring(counted(calibrated()).plot())
    assert root.tag == f"{SVG}svg"
    width, dots = float(root.get("width", 0)), root.findall(f"{SVG}circle")
    assert len(dots) == BINS
    assert all(0 < float(dot.get(axis, -1)) < width for dot in dots for axis in ("cx", "cy"))
    heights = [float(dot.get("cy", 0)) for dot in dots]
    assert heights[0] > heights[-1]  # more sure, more often right: higher up
    assert not ElementTree.fromstring(Calibration().plot()).findall(f"{SVG}circle")
