"""Bayesian optimisation on the unit cube: a Gaussian process, and where it expects the largest improvement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import erf, pi, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_SCALES = (0.1, 0.2, 0.4, 0.8)
_NOISES = (1e-4, 1e-2, 1e-1)
_CANDIDATES = 2000


def suggest(points: Sequence[Sequence[float]], gains: Sequence[float], seed: int) -> Iterator[list[float]]:
    """Yield points to try next, the best first.

    The model is a Gaussian process with a Matern 5/2 kernel over standardised gains; its length scale and noise are
    those of a small grid with the largest marginal likelihood (Rasmussen and Williams, 2006, algorithm 2.1). Candidates
    are random points, and random steps from the best points so far. They are ranked by expected improvement (Jones et
    al., 1998, equation 15).

    Args:
        points: [trials][keys], each from 0 to 1.
        gains: [trials], more is better.
        seed: seed of the candidates.
    """
    x, y = np.asarray(points, float), np.asarray(gains, float)
    y = (y - y.mean()) / (y.std() or 1.0)
    draw = np.random.default_rng(seed)
    best = x[np.argsort(-y)[:3]]
    near = best[draw.integers(len(best), size=_CANDIDATES // 2)]
    steps = draw.normal(0.0, 1.0, near.shape) * draw.choice([0.02, 0.1], size=(len(near), 1))
    candidates = np.concatenate([draw.random((_CANDIDATES, x.shape[1])), np.clip(near + steps, 0.0, 1.0)])
    scale, noise = max(
        ((scale, noise) for scale in _SCALES for noise in _NOISES), key=lambda pair: _log_likelihood(x, y, *pair)
    )
    mean, deviation = _predict(x, y, candidates, scale, noise)
    improvement = _expected_improvement(mean, deviation, float(_predict(x, y, x, scale, noise)[0].max()))
    for index in np.argsort(-improvement, kind="stable"):
        yield candidates[index].tolist()


def _kernel(a: Floats, b: Floats, scale: float) -> Floats:
    """Return the Matern 5/2 kernel [a, b] of points."""
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)) * (sqrt(5.0) / scale)
    value: Floats = (1.0 + distance + distance**2 / 3.0) * np.exp(-distance)
    return value


def _factor(x: Floats, scale: float, noise: float) -> Floats:
    lower: Floats = np.linalg.cholesky(_kernel(x, x, scale) + (noise + 1e-8) * np.eye(len(x))).astype(np.float64)
    return lower


def _log_likelihood(x: Floats, y: Floats, scale: float, noise: float) -> float:
    lower = _factor(x, scale, noise)
    white = np.linalg.solve(lower, y)
    return float(-0.5 * white @ white - np.log(np.diag(lower)).sum())


def _predict(x: Floats, y: Floats, at: Floats, scale: float, noise: float) -> tuple[Floats, Floats]:
    """Return mean and standard deviation [at] of the process without noise."""
    lower, cross = _factor(x, scale, noise), _kernel(x, at, scale)
    white = np.linalg.solve(lower, cross)
    mean = white.T @ np.linalg.solve(lower, y)
    return mean, np.sqrt(np.maximum(1.0 - (white**2).sum(0), 1e-12))


def _expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    z = (mean - best) / deviation
    below = np.array([0.5 * (1.0 + erf(value / sqrt(2.0))) for value in z])
    density = np.exp(-0.5 * z**2) / sqrt(2.0 * pi)
    improvement: Floats = deviation * (z * below + density)
    return improvement
