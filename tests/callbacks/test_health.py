import json
import math

import pytest
import torch

from megarl.callbacks.health import Health
from megarl.callbacks.summary import Summary
from megarl.errors import NumericsError
from tests.callbacks.tiny import SaveAt, Tiny, train
from tests.refusals import refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_ends_the_run_with_step_and_file(bad, tmp_path):
    names = (str(bad), "step 3", str(tmp_path / "nan-batch-rank0.pt"))
    with refused(NumericsError, key="train/loss", names=names) as found:
        train(Tiny([3.0, 2.0, bad, 1.0]), [Health(tmp_path)], steps=4)
    assert found.error.exit_code == 3
    assert str(found.error.value) == str(bad)


def test_the_batch_of_the_bad_step_can_be_read_back_safely(tmp_path):
    with pytest.raises(NumericsError):
        train(Tiny([3.0, 2.0, math.nan]), [Health(tmp_path)], steps=3)
    dumped = torch.load(tmp_path / "nan-batch-rank0.pt", weights_only=True)
    assert [(batch["tokens"].tolist(), batch["rows.step"].tolist()) for batch in dumped] == [([[2]], [2])]


def test_step_that_refuses_its_own_numbers_is_dumped_and_its_message_completed(tmp_path):
    def refuse(step: int) -> None:
        if step == 1:
            raise NumericsError("the gradient norm of policy is nan", key="policy", value=math.nan)

    module = Tiny([3.0, 2.0])
    module.in_step = refuse
    path = tmp_path / "nan-batch-rank0.pt"
    with refused(NumericsError, key="policy", names=("step 2", str(path))) as found:
        train(module, [Health(tmp_path)], steps=2)
    assert found.line.startswith("the gradient norm of policy is nan")
    assert torch.load(path, weights_only=True)[0]["rows.step"] == 1


def test_finite_losses_pass(tmp_path):
    trainer = train(Tiny([3.0, 0.0, -1e30]), [Health(tmp_path)], steps=3)
    assert trainer.global_step == 3
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_saved_after_a_bad_step(tmp_path):
    callbacks = [Health(tmp_path), SaveAt(2, tmp_path / "two.ckpt")]
    with pytest.raises(NumericsError):
        train(Tiny([3.0, math.nan]), callbacks, steps=2)
    assert not (tmp_path / "two.ckpt").exists()


def test_a_batch_that_cannot_be_written_does_not_hide_the_numbers(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(NumericsError, key="train/loss", names=("nan", "step 1")) as found:
        train(Tiny([math.nan]), [Health(tmp_path / "file" / "run")], steps=1)
    assert "nan-batch" not in found.line


def test_the_summary_names_the_step_and_the_file(tmp_path):
    with pytest.raises(NumericsError):
        train(Tiny([math.nan]), [Health(tmp_path), Summary(tmp_path)], steps=1)
    error = json.loads((tmp_path / "summary.json").read_text())["error"]
    assert "step 1" in error
    assert str(tmp_path / "nan-batch-rank0.pt") in error


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path):
    with refused(NumericsError, key="eval/loss", names=("nan", "step 2")):
        train(Tiny([3.0, 2.0, 1.0], [math.nan]), [Health(tmp_path)], steps=3, eval_every=2)


@pytest.mark.parametrize("name", ["policy/ratio", "value/explained_variance", "rollout/kl"])
def test_whatever_a_step_logs_must_be_finite(name, tmp_path):
    module = Tiny([3.0])
    module.in_step = lambda step: module.log(name, math.inf)
    with refused(NumericsError, key=name, value=math.inf, names=("step 1",)):
        train(module, [Health(tmp_path)], steps=1)
