"""Callbacks of one's own run in every process, keep their state over a resume, and fail in one line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.callbacks.own import failure_of, own_callbacks
from megarl.config.compose import compose
from megarl.config.files import check_files
from megarl.errors import CheckpointError, ConfigError
from tests.e2e.runs import metrics, run_ppo
from tests.refusals import assert_entry_refuses, refused
from tests.worlds import Worlds

HERE = Path(__file__).parent
OWN = HERE / "callbacks.py"
MEDIAN = HERE / "advantages.py"
KEY, OPTIONS = "extensions.callbacks", "extensions.callback_options"


def resumed(run_dir: Path, *settings: str) -> str:
    """What the log says of a run that goes on for another phase."""
    run_ppo(run_dir, *settings, "trainer.max_phases=3")
    return "".join(path.read_text() for path in (run_dir / "logs").iterdir())


def refuses_other_advantages(run_dir: Path, *settings: str) -> None:
    with refused(CheckpointError, key="ppo.advantages", value="grpo"):
        run_ppo(run_dir, *settings, "trainer.max_phases=4", "ppo.advantages=grpo")


def test_own_advantages_and_callbacks_run_in_every_process_and_are_resumed(worlds: Worlds, tmp_path: Path) -> None:
    run, seen = tmp_path / "run", tmp_path / "seen.txt"
    own = shutil.copy(OWN, tmp_path / "own.py")
    settings = [
        *("clone=null", "ppo.kl_coef=0", "ppo.rollouts=8", "ppo.inner_epochs=1", "trainer.global_batch_size=8"),
        *("trainer.micro_batch_size=2", "rollout.n=4", "reward.fn=megarl.rewards.builtin:length"),
        *("checkpoint.every=1", "checkpoint.save_last=true"),
        f"ppo.advantages={MEDIAN}:above_median",
        f"{KEY}=[{own}:BestScore]",
        f"{OPTIONS}.path={seen}",
    ]
    worlds.run(2, run_ppo, run, *settings)
    scores = [score for (score,) in metrics(run, "rollout/score")]
    assert [float(line.split()[0]) for line in seen.read_text().splitlines()] == pytest.approx(scores, abs=1e-4)
    described = json.loads((run / "extensions.json").read_text())
    assert {key: each["name"] for key, each in described.items()} == {
        "ppo.advantages": f"{MEDIAN}:above_median",
        f"{KEY}[0]": f"{own}:BestScore",
    }

    Path(own).write_text(OWN.read_text() + "\n# another version\n")
    (log,) = worlds.run(1, resumed, run, *settings)
    assert f"{KEY}[0]" in log
    assert "has changed" in log
    best = [float(line.split()[1]) for line in seen.read_text().splitlines()]
    assert len(best) == 3
    assert best[2] >= best[1], "the state came from the checkpoint"
    worlds.run(1, refuses_other_advantages, run, *settings)


def test_a_callback_gets_the_options_that_it_takes(tmp_path: Path) -> None:
    (one,) = own_callbacks([f"{OWN}:BestScore"], {"path": str(tmp_path), "patience": 3})
    assert (one.path, one.patience) == (tmp_path, 3)  # type: ignore[attr-defined]
    (stopping,) = own_callbacks(["lightning.pytorch.callbacks:EarlyStopping"], {"monitor": "eval/score"})
    assert stopping.monitor == "eval/score"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([f"{KEY}=[{OWN}:BestScor]"], ("BestScore",)),
        ([f"{KEY}=[BestScore]"], (f"{KEY}=BestScore", "package.module:class")),
        ([f"{KEY}=[nowhere.py:Own]"], ("nowhere.py",)),
        ([f"{KEY}=[{OWN}:BestScore,{OWN}:BestScore]"], ("BestScore", "twice")),
        ([f"{KEY}=[{OWN}:BestScore]", f"{OPTIONS}.pathh=a"], (f"{OPTIONS}.pathh", "path")),
        ([f"{OPTIONS}.path=a"], (f"{OPTIONS}.path",)),
    ],
)
def test_a_callback_that_cannot_be_is_refused_before_anything_is_imported(
    settings: list[str], names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_entry_refuses("ppo", ["+conf=randomwalks", *settings], names, capsys)


@pytest.mark.parametrize(
    ("text", "options", "names"),
    [
        ("class Own: ...", {}, ("Own", "lightning.pytorch.Callback")),
        ("from lightning.pytorch.callbacks import ModelCheckpoint as Own", {}, ("checkpoint.every",)),
        ("import nothing_of_this_name\nOwn = 1", {}, ("ModuleNotFoundError", "own.py:1")),
        (
            "from lightning.pytorch import Callback\nclass Own(Callback):\n    def __init__(self, path): ...",
            {},
            ("TypeError", "path", OPTIONS),
        ),
        (
            "from lightning.pytorch import Callback\nclass Own(Callback):\n    def __init__(self): raise OSError(5)",
            {},
            ("OSError", "own.py:3"),
        ),
    ],
)
def test_a_class_of_the_wrong_kind_is_refused_in_one_line(
    text: str, options: dict[str, Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with refused(ConfigError, key=KEY, value=f"{file}:Own", names=names):
        own_callbacks([f"{file}:Own"], options)


def test_an_option_that_only_importing_shows_to_be_unknown_is_refused() -> None:
    with refused(ConfigError, key=f"{OPTIONS}.moniter", value="x"):
        own_callbacks(["lightning.pytorch.callbacks:EarlyStopping"], {"monitor": "y", "moniter": "x"})


def test_an_exception_of_a_callback_is_told_from_a_bug(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from lightning.pytorch import Callback\n"
        "class Own(Callback):\n"
        "    def on_train_start(self, trainer, module): module.nothing()\n"
    )
    (own,) = own_callbacks([f"{file}:Own"], {})
    with pytest.raises(AttributeError) as caught:
        own.on_train_start(None, torch.nn.Module())  # type: ignore[arg-type]
    told = failure_of(caught.value, [f"{file}:Own"])
    assert told is not None
    assert told.key == KEY
    with pytest.raises(ZeroDivisionError) as elsewhere:
        print(1 / 0)  # noqa: T201
    assert failure_of(elsewhere.value, [f"{file}:Own"]) is None


def test_a_configuration_without_callbacks_is_not_touched(caplog: pytest.LogCaptureFixture) -> None:
    config, _ = compose("sft", [])
    with caplog.at_level(logging.WARNING):
        check_files(config)
    assert config.extensions is None
    assert caplog.text == ""
