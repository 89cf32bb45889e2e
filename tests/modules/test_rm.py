"""What a reward model measures of its scores, and which of them describe it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl.algorithms import RunningMoments
from megarl.config.rm import RewardModelConfig
from megarl.experience.calibration import Calibration
from megarl.modules import rm
from megarl.modules.rm import RewardModel, at_last_marked
from megarl.parallel.rows import Rows

# Two responses of three and of two steps; the second was truncated within a third step.
LENGTHS = torch.tensor([6, 5])
MASK = torch.tensor([[0.0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]])
SCORES = torch.tensor([[9.0, 1, 9, -2, 9, 5], [9, 2, 3, 9, 9, 9]])
TARGET = torch.tensor([[0.0, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]])


def rows() -> Rows:
    made = Rows(torch.zeros(2, 6, dtype=torch.long), LENGTHS, MASK)
    return made.with_columns(target=TARGET, unit=torch.arange(2))


def module(kind: str, monkeypatch: pytest.MonkeyPatch, step_loss: str = "logistic") -> Any:
    """A reward model whose scores are given, without any model."""
    config = RewardModelConfig()
    config.rm.kind, config.rm.step_loss = kind, step_loss
    monkeypatch.setattr(rm, "score_rows", lambda *args, **options: SCORES)
    made = SimpleNamespace(config=config, eval_data=0, policy=None, kind=kind, eval_sums={}, scored=[], table=[])
    made.calibration, made._moments, made._read_moments = Calibration(), RunningMoments(), RunningMoments()
    made.rows_of, made.grid, made.steps_done = lambda data, units: rows(), SimpleNamespace(rank=1), 7
    for name in ("_evaluate", "_sums", "_counts", "_of_steps"):
        setattr(made, name, getattr(RewardModel, name).__get__(made))
    made.read_moments = lambda: RewardModel.moments.fget(made)  # type: ignore[attr-defined]
    return made


def test_the_last_marked_token_is_that_of_the_last_step() -> None:
    assert at_last_marked(SCORES, rows()).tolist() == [5, 3]


def test_moments_of_steps_are_those_of_the_last_step_of_each_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps have a mean of 1.8; a reward model's user reads the last score of a response."""
    made = module("steps", monkeypatch)
    made._evaluate(torch.arange(2))
    assert made.read_moments() == pytest.approx((4.0, 2**0.5))
    assert made._moments.mean == pytest.approx(1.8), "eval/score_std is over all scores"


@pytest.mark.parametrize("step_loss", ["logistic", "squared"])
def test_steps_are_measured_as_if_they_stood_alone(step_loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of unmarked tokens, NaN too, change neither sums nor gradients."""
    made, marked = module("steps", monkeypatch, step_loss), MASK.bool()
    scores = torch.where(marked, SCORES, torch.nan).requires_grad_()
    sums = made._sums(scores, rows())
    alone, target = SCORES[marked].requires_grad_(), TARGET[marked]
    if step_loss == "squared":
        wanted = (alone - target).square().sum()
        assert float(sums["error"]) == pytest.approx(float((alone - target).abs().sum()))
    else:
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(alone, target, reduction="sum")
        assert float(sums["accuracy"]) == 4.0, "all but the 2 of a step whose label is 0"
    torch.testing.assert_close(sums["unit_loss"], wanted)
    assert float(sums["score"]) == pytest.approx(9.0)
    assert int(made._counts(rows())["units"]) == 5
    sums["unit_loss"].backward()
    wanted.backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[marked], alone.grad)
    assert not scores.grad[~marked].any()
