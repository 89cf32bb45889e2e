import json
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from megarl.callbacks.summary import Summary
from megarl.errors import NumericsError
from tests.callbacks.tiny import SaveAt, Tiny, train


def read(folder: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "summary.json").read_text(), parse_constant=refuse)


def failing(error: BaseException, at: int = 2) -> Tiny:
    def fail(step: int) -> None:
        if step == at:
            raise error

    module = Tiny([3.0, 2.0, 1.0, 0.5])
    module.in_step = fail
    return module


def test_last_best_and_mean_of_the_last_five(tmp_path):
    losses = [9.0, 1.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    train(Tiny(losses), [Summary(tmp_path)], steps=7)
    summary = read(tmp_path)
    assert summary["metrics"]["train/loss"] == {"first": 9.0, "last": 2.0, "best": 1.0, "last5": 4.0}  # (6+5+4+3+2) / 5
    assert (summary["status"], summary["steps"], summary["max_steps"]) == ("finished", 7, 7)
    assert summary["world_size"] == 1


def test_values_are_taken_at_loggings_and_at_the_last_step(tmp_path):
    train(Tiny([7.0, 6.0, 5.0, 4.0, 3.0]), [Summary(tmp_path)], steps=5, log_every=2)
    # steps 2, 4 and 5
    assert read(tmp_path)["metrics"]["train/loss"]["last5"] == pytest.approx((6 + 4 + 3) / 3)


def test_evaluation_metrics_count_evaluations_and_know_their_direction(tmp_path):
    train(Tiny([1.0] * 6, evals=[4.0, 2.0, 3.0]), [Summary(tmp_path)], steps=6, eval_every=2)
    metrics = read(tmp_path)["metrics"]
    assert metrics["eval/loss"] == {"first": 4.0, "last": 3.0, "best": 2.0, "last5": 3.0}
    assert metrics["eval/accuracy"]["best"] == pytest.approx(0.8)
    assert metrics["eval/accuracy"]["last"] == pytest.approx(0.7)


def test_is_refreshed_as_running_at_every_evaluation(tmp_path):
    class Look(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[str, int]] = []

        def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
            self.seen.append((read(tmp_path)["status"], read(tmp_path)["steps"]))

    look = Look()
    train(Tiny([1.0] * 4, evals=[1.0, 1.0]), [Summary(tmp_path), look], steps=4, eval_every=2)
    assert look.seen == [("running", 2), ("running", 4)]
    assert read(tmp_path)["status"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_values_that_are_not_finite_are_null_and_never_best(tmp_path):
    train(Tiny([2.0, math.nan, -math.inf]), [Summary(tmp_path)], steps=3)
    assert read(tmp_path)["metrics"]["train/loss"] == {"first": 2.0, "last": None, "best": 2.0, "last5": None}


def test_failure_is_recorded_with_its_error_in_one_line(tmp_path):
    with pytest.raises(NumericsError):
        train(failing(NumericsError("loss is nan\n at step 2")), [Summary(tmp_path)], steps=4)
    summary = read(tmp_path)
    assert summary["status"] == "failed"
    assert summary["error"] == "NumericsError: loss is nan at step 2"
    assert summary["steps"] == 2
    assert summary["metrics"]["train/loss"]["last"] == 2.0


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), SIGTERMException()])
def test_interruption(signal, tmp_path):
    with pytest.raises(SystemExit):
        train(failing(signal), [Summary(tmp_path)], steps=4)
    assert read(tmp_path)["status"] == "interrupted"
    assert "error" not in read(tmp_path)


@pytest.mark.parametrize(("at", "status"), [(2, "stopped"), (4, "finished")])
def test_a_run_that_is_asked_to_stop_early_is_stopped(at, status, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= at

    train(Tiny([1.0] * 4), [Summary(tmp_path), Stop()], steps=4)
    assert (read(tmp_path)["status"], read(tmp_path)["steps"]) == (status, at)


def test_resumed_run_keeps_history_and_time(tmp_path):
    losses = [8.0, 1.0, 6.0, 5.0, 4.0, 3.0]
    first, checkpoint = Summary(tmp_path), tmp_path / "four.ckpt"
    first._began = (first._began[0] - 1000.0, first._began[1] - 500.0)  # as if it had taken that long
    module = Tiny(losses, evals=[2.5, 9.0])
    with module.clock.part("train"):
        pass
    module.clock._counted["train"] = (700.0, 300.0)
    train(module, [first, SaveAt(4, checkpoint)], steps=5, eval_every=3)
    resumed = Tiny(losses, evals=[3.5])
    train(resumed, [Summary(tmp_path)], steps=6, eval_every=3, resume=checkpoint)
    summary = read(tmp_path)
    mean = pytest.approx(19 / 5)  # of 1 6 5 4 3
    assert summary["metrics"]["train/loss"] == {"first": 8.0, "last": 3.0, "best": 1.0, "last5": mean}
    assert summary["metrics"]["eval/loss"] == {"first": 2.5, "last": 3.5, "best": 2.5, "last5": 3.0}
    assert 1000 < summary["wall_s"] < 1100
    assert 500 < summary["cpu_s"] < 600
    assert 700 < summary["seconds"]["train"]["wall_s"] < 710
    assert set(summary["seconds"]) == {"train", "eval"}


def test_a_resume_that_fails_before_it_has_begun_leaves_the_summary_but_for_its_status(tmp_path):
    train(Tiny([3.0, 2.0]), [Summary(tmp_path)], steps=2)
    before = read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no-such\.ckpt"):
        train(Tiny([3.0, 2.0]), [Summary(tmp_path)], steps=2, resume=tmp_path / "no-such.ckpt")
    after = read(tmp_path)
    assert after["status"] == "failed"
    assert "no-such.ckpt" in after["error"]
    for key in ("steps", "metrics", "wall_s"):
        assert after[key] == before[key]


def test_an_earlier_error_is_forgotten_when_the_run_goes_on(tmp_path):
    with pytest.raises(NumericsError):
        train(failing(NumericsError("x")), [Summary(tmp_path)], steps=4)
    train(Tiny([1.0]), [Summary(tmp_path)], steps=1)
    assert "error" not in read(tmp_path)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", False)
    train(Tiny([1.0]), [Summary(tmp_path)], steps=1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_hide_the_first_error(tmp_path, monkeypatch):
    summary = Summary(tmp_path)
    first = NumericsError("the real reason")
    module = failing(first)
    inner = module.in_step

    def then_fill_disk(step: int) -> None:
        if step == 2:
            monkeypatch.setattr("megarl.callbacks.summary.write_atomically", refuse)
        inner(step)

    def refuse(path: Path, text: str) -> None:
        raise OSError("disk full")

    module.in_step = then_fill_disk
    with pytest.raises(NumericsError) as caught:
        train(module, [summary], steps=4)
    assert caught.value is first
