"""Responses of evaluations: shown on the terminal, kept in the run folder, and handed to loggers that take text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.callbacks.samples import Samples, as_table
from tests.callbacks.tiny import Tiny, train

FIRST = {"prompt": "2+2=", "response": "four | 4\nand on", "score": 0.123456}
SECOND = {"prompt": "2+2=", "response": "[bold]4[/bold] [/]", "score": None}


class Answers(Tiny):
    """Leaves other samples at every evaluation."""

    def __init__(self, *samples: dict[str, Any]) -> None:
        super().__init__([1.0] * 4, evals=[1.0] * 2)
        self.left, self.samples = list(samples), []

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.samples = [self.left.pop(0)] if self.left else []


def test_every_evaluations_samples_are_kept_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="megarl"):
        train(Answers(FIRST, SECOND), [Samples(tmp_path)], steps=4, eval_every=2)
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert kept == [{"step": 2, **FIRST}, {"step": 4, **SECOND}]
    shown = [message for message in caplog.messages if "samples:" in message]
    assert shown[0].startswith("step 2  samples:\n")
    assert "0.1235" in shown[0]
    assert "[bold]4[/bold] [/]" in shown[1]


def test_those_of_the_evaluation_before_training_are_of_step_0(tmp_path: Path) -> None:
    module = Answers(SECOND)
    module.samples = [FIRST]
    train(module, [Samples(tmp_path)], steps=2, eval_every=2)
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert kept == [{"step": 0, **FIRST}, {"step": 2, **SECOND}]


def test_what_steers_a_terminal_is_shown_as_an_escape() -> None:
    assert "\\x1b[2J" in as_table([{"response": "\x1b[2J"}])


def test_an_evaluation_without_samples_leaves_nothing(tmp_path: Path) -> None:
    train(Answers(), [Samples(tmp_path)], steps=4, eval_every=2)
    assert list(tmp_path.iterdir()) == []


def test_a_response_is_no_markup_and_a_long_one_is_cut() -> None:
    table = as_table([{"response": "[red]x[/red] [/no]"}, {"response": "y" * 1000}])
    assert "[red]x[/red] [/no]" in table
    assert table.count("y") == 200
    assert "..." in table


def test_tensorboard_gets_a_table_whose_cells_stay_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    texts: list[tuple[str, str, int]] = []
    board = TensorBoardLogger(tmp_path / "board")
    monkeypatch.setattr(board.experiment, "add_text", lambda *given: texts.append(given))
    train(Answers(FIRST), [Samples(tmp_path)], steps=2, eval_every=2, logger=[board])
    assert texts == [
        ("samples", "| prompt | response | score |\n| --- | --- | --- |\n| 2+2= | four \\| 4 and on | 0.1235 |", 2)
    ]
