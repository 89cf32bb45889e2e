"""What a run starts from is measured once, before anything is learnt, and stands at step 0 of every log."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer

from megarl.callbacks.initial_evaluation import InitialEvaluation
from megarl.experience.evaluation import Evaluated
from megarl.run.csv_logger import MetricsFile
from tests.callbacks.tiny import SaveAt, Tiny, train

LOSSES = [3.0, 2.0, 1.0, 0.5]


class Evaluates(Tiny):
    """Can evaluate by itself, and remembers at which step it did."""

    def __init__(self, evaluation: object | None = object()) -> None:
        super().__init__(LOSSES, evals=[9.0] * 4)
        self.evaluation = evaluation
        self.baseline: dict[str, float] = {}
        self.samples: list[dict[str, str]] = []
        self.evaluated_at: list[int] = []

    def evaluate(self) -> Evaluated:
        self.evaluated_at.append(self.trainer.global_step)
        return Evaluated(metrics={"eval/score": 0.25}, samples=[{"prompt": "p"}])


def test_it_is_measured_before_the_first_step_and_logged_at_step_0(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, path = Evaluates(), tmp_path / "metrics.csv"
    with caplog.at_level("INFO", logger="megarl"):
        train(module, [InitialEvaluation()], steps=2, eval_every=2, logger=[MetricsFile(path)])
    assert module.evaluated_at == [0]
    assert module.baseline == {"eval/score": 0.25}
    assert module.samples == [{"prompt": "p"}]
    header, first, *_ = (line.split(",") for line in path.read_text().splitlines())
    assert dict(zip(header, first, strict=False))["step"] == "0"
    assert float(dict(zip(header, first, strict=False))["eval/score"]) == 0.25
    assert any(message == "before training  evaluation: score 0.25" for message in caplog.messages)


@pytest.mark.parametrize(("evaluation", "eval_every"), [(None, 2), (object(), None)])
def test_a_run_that_is_never_evaluated_has_none(evaluation: object | None, eval_every: int | None) -> None:
    module = Evaluates(evaluation)
    train(module, [InitialEvaluation()], steps=2, eval_every=eval_every)
    assert module.evaluated_at == []
    assert module.baseline == {}


def test_a_module_that_cannot_evaluate_by_itself_is_left_alone() -> None:
    module = Tiny(LOSSES, evals=[1.0])
    trainer = train(module, [InitialEvaluation()], steps=2, eval_every=2)
    assert trainer.global_step == 2
    assert not hasattr(module, "baseline")


def test_a_resumed_run_has_had_its_baseline(tmp_path: Path) -> None:
    train(Evaluates(), [InitialEvaluation(), SaveAt(2, tmp_path / "saved")], steps=2, eval_every=2)
    resumed = Evaluates()
    callbacks: list[Callback] = [InitialEvaluation()]
    trainer: Trainer = train(resumed, callbacks, steps=4, eval_every=2, resume=tmp_path / "saved")
    assert trainer.global_step == 4
    assert resumed.evaluated_at == []
