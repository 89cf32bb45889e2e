"""Whether a reward model is as sure as it is right: confidence against accuracy, as a table and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 10
SIDE, EDGE = 360, 40  # pixels of the plot's square, and around it


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies between two values.

    Attributes:
        weight: number of pairs, each as a share of its prompt's.
        confidence: mean confidence.
        accuracy: share of the pairs in which the better response has the higher score.
    """

    low: float
    high: float
    weight: float
    confidence: float
    accuracy: float


class Calibration:
    """Counts pairs by confidence: the probability that the model gives to the response that it prefers."""

    def __init__(self) -> None:
        self.sums = torch.zeros(BINS, 3, dtype=torch.float64)  # weight, confidence, accuracy

    def add(self, lead: Tensor, weight: Tensor) -> None:
        """Count pairs: the score of the better response minus that of the other, and weights, [pairs]."""
        confidence = torch.sigmoid(lead.double().abs())
        right = (lead > 0).double() + 0.5 * (lead == 0)
        place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
        added = weight.double()[:, None] * torch.stack([torch.ones_like(right), confidence, right], dim=1)
        self.sums.index_add_(0, place, added)

    def bins(self) -> Iterator[Bin]:
        """Iterate over the bins that have pairs."""
        for number, (weight, confidence, right) in enumerate(self.sums.tolist()):
            if weight > 0:
                low = 0.5 + number / (2 * BINS)
                yield Bin(low, low + 1 / (2 * BINS), weight, confidence / weight, right / weight)

    @property
    def error(self) -> float:
        """Mean difference of confidence and accuracy over all pairs."""
        total = float(self.sums[:, 0].sum())
        return sum(one.weight * abs(one.confidence - one.accuracy) for one in self.bins()) / total if total else 0.0

    def table(self) -> str:
        """Return the bins as CSV."""
        lines = ["from,to,pairs,confidence,accuracy"]
        lines += [
            f"{one.low:.2f},{one.high:.2f},{one.weight:.6g},{one.confidence:.6f},{one.accuracy:.6f}"
            for one in self.bins()
        ]
        return "\n".join(lines) + "\n"

    def plot(self) -> str:
        """Return an SVG: accuracy over confidence, with the line on which a calibrated model lies."""
        largest = max((one.weight for one in self.bins()), default=1.0)

        def x(confidence: float) -> float:
            return EDGE + (confidence - 0.5) * 2 * SIDE

        def y(accuracy: float) -> float:
            return EDGE + (1 - accuracy) * SIDE

        dots = "".join(
            f'<circle cx="{x(one.confidence):.1f}" cy="{y(one.accuracy):.1f}" fill="#1f77b4" '
            f'r="{3 + 7 * (one.weight / largest) ** 0.5:.1f}"><title>{one.weight:.6g} pairs</title></circle>'
            for one in self.bins()
        )
        marks = "".join(
            f'<text x="{x(0.5 + value / 2):.0f}" y="{EDGE + SIDE + 16}" text-anchor="middle">{0.5 + value / 2:g}</text>'
            f'<text x="{EDGE - 6}" y="{y(value) + 4:.0f}" text-anchor="end">{value:g}</text>'
            for value in (0.0, 0.5, 1.0)
        )
        whole = SIDE + 2 * EDGE
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{whole}" font-family="sans-serif" '
            f'font-size="12"><rect width="{whole}" height="{whole}" fill="white"/>'
            f'<rect x="{EDGE}" y="{EDGE}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#888"/>'
            f'<line x1="{x(0.5)}" y1="{y(0.5)}" x2="{x(1.0)}" y2="{y(1.0)}" stroke="#888" stroke-dasharray="4"/>'
            f'{marks}{dots}<text x="{whole / 2}" y="{whole - 8}" text-anchor="middle">confidence</text>'
            f'<text x="12" y="{whole / 2}" text-anchor="middle" transform="rotate(-90 12 {whole / 2})">accuracy</text>'
            "</svg>\n"
        )
