"""An algorithm outside of megarl: found by name or announced by a package, run like any other, refused in one line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import megarl
from megarl import algorithm, cli, listing
from megarl.config.algorithms import ALGORITHMS, entry_point, find_algorithm
from megarl.config.compose import compose
from megarl.errors import ConfigError
from megarl.inputs import _algorithm
from megarl.training import module_of
from tests.e2e.runs import SMALL, launched, metrics
from tests.extensions.conftest import Install
from tests.refusals import refused
from tests.worlds import Worlds

FILE = Path(__file__).parent / "focal" / "declared.py"
NAME = f"{FILE}:FOCAL"
MODULE = "tests.extensions.focal.declared:FOCAL"
SETTINGS = [
    *SMALL,
    *("model.num_layers=2", "model.hidden_size=32", "data.seq_length=16", "checkpoint.save_last=true"),
    "data.train=[megarl.tasks.demo:train]",
]


def trained(run_dir: Path, *settings: str) -> str:
    """Train in the current world, as under torchrun, and return what the run's log says."""
    from megarl.training import train

    with launched():
        config, _ = compose(NAME, [*SETTINGS, f"run.dir={run_dir}", *settings])
        assert train(NAME, config) == 0
    return "".join(path.read_text() for path in (run_dir / "logs").iterdir())


def test_it_trains_in_every_process_and_a_resume_tells_its_changed_keys(worlds: Worlds, tmp_path: Path) -> None:
    run = tmp_path / "run"
    worlds.run(2, trained, run, "trainer.max_steps=1", "focal.gamma=200")
    uniform = 1 / 259  # about the probability of every token of the byte tokenizer under random weights
    ((loss,),) = metrics(run, "train/loss")
    assert loss == pytest.approx(-((1 - uniform) ** 200) * math.log(uniform), rel=0.05)
    (log,) = worlds.run(1, trained, run, "trainer.max_steps=2", "focal.gamma=1")
    assert "focal.gamma: 200.0 -> 1.0" in log
    assert metrics(run, "train/loss")[1][0] > 5
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_it_has_its_help_its_defaults_and_settings_for_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megarl", NAME, "--help"])
    with pytest.raises(SystemExit) as ended:
        algorithm.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert f"megarl train {NAME}" in out
    assert "focal.gamma=1.0" in out
    config = megarl.default_config(NAME, "focal.gamma=0.5")
    assert (config.focal.gamma, config.optim.lr) == (0.5, 5e-4)
    assert _algorithm(None, ["a"], None, config) == "focal"
    with pytest.raises(AttributeError, match="gama"):
        config.focal.gama = 1


def test_an_installed_package_announces_it_under_a_short_name(install: Install) -> None:
    install("losses", algorithms=f"focal = {MODULE}")
    assert ("focal", f"{MODULE} of losses 1.2 (megarl train focal)") in list(listing.algorithms())
    assert find_algorithm("focal").config.__name__ == "FocalConfig"
    assert entry_point("focal").command == "train focal"
    assert module_of("focal").__name__ == "Focal"
    install("others", algorithms="focal = elsewhere:FOCAL")
    del ALGORITHMS["focal"]
    with refused(ConfigError, key="megarl.algorithms", value="focal", names=("losses 1.2", "others 1.2")):
        find_algorithm("focal")


def test_the_command_train_takes_megarls_own_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megarl"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "ppo", "--help", "ppo.gamma"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("ppo.gamma=1.0")


DECLARED = """
from megarl.config.algorithms import Algorithm
from megarl.config.sft import SFTConfig
OWN = Algorithm(**{{"name": "own", "config": SFTConfig, "module": "megarl.modules.sft:SFT", "about": "It.",
    "learns_from": "samples", **{changes}}})
"""


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ('{"name": "ppo"}', ("ppo",)),
        ('{"name": "generate"}', ("generate",)),
        ('{"name": "my own"}', ("my own",)),
        ('{"config": dict}', ("TrainingTree",)),
        ('{"learns_from": "texts"}', ("texts", "rewarded samples")),
        ('{"unit": "epoch"}', ("epoch", "phase")),
        ('{"defaults": {"optim.lrr": 1}}', ("optim.lrr",)),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(changes: str, names: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(DECLARED.format(changes=changes))
    with refused(ConfigError, key="algorithm", value=f"{file}:OWN", names=names):
        find_algorithm(f"{file}:OWN")


@pytest.mark.parametrize(
    ("text", "name", "names"),
    [
        ("OWN = 1", "OWN", ("int", "Algorithm")),
        ("OWN = 1", "OWNN", ("OWN",)),
        ("import nothing_of_this_name", "OWN", ("OWN",)),
        ("from nothing_of_this_name import OWN", "OWN", ("ModuleNotFoundError", "own.py:1")),
        (DECLARED.format(changes='{"module": "megarl.modules.sft:SFTT"}'), "OWN", ("SFT",)),
    ],
)
def test_a_name_that_is_no_algorithm_is_refused(text: str, name: str, names: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with refused(ConfigError, names=(str(file), *names)):
        find_algorithm(f"{file}:{name}")


def test_a_module_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(DECLARED.format(changes='{"module": "pathlib:Path"}'))
    with refused(ConfigError, value="pathlib:Path", names=("megarl.modules.base.Module",)):
        module_of(f"{file}:OWN")


def test_the_same_name_again_is_no_second_algorithm(tmp_path: Path) -> None:
    assert find_algorithm(NAME) == find_algorithm(NAME)
    with refused(ConfigError, key="algorithm", value=MODULE, names=("focal", NAME)):
        find_algorithm(MODULE)


@pytest.mark.parametrize(
    ("words", "key", "names"),
    [
        (["nobodys"], "algorithm", ("nobodys", "ppo", "package.module:NAME")),
        (["optim.lr=1"], "algorithm", ("optim.lr=1", "megarl train NAME")),
        ([NAME, "focal.gama=1"], "focal.gama", ("focal.gamma",)),
        ([NAME, "focal.gamma=-1"], "focal.gamma", ("-1",)),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(
    words: list[str], key: str, names: tuple[str, ...], monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megarl", *words])
    with pytest.raises(SystemExit) as ended:
        algorithm.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.count("\n") == 1
    assert all(name in err for name in (key, *names)), err
