"""An algorithm of the table's, and of nothing else, runs from the command line and from Python."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megarl
from megarl.config.algorithms import ALGORITHMS
from megarl.config.compose import compose
from megarl.errors import CheckpointError
from megarl.training import train
from tests.e2e.runs import WALKS
from tests.kin import KIN
from tests.refusals import refused
from tests.worlds import Worlds

ROOT = Path(megarl.__file__).resolve().parents[1]
PROGRAM = """
import sys
from tests.kin import ALGORITHMS, KIN

ALGORITHMS[KIN.name] = KIN
from megarl.{module} import {name}

{call}
"""
SETTINGS = [*WALKS, "trainer.max_phases=1", "checkpoint.save_last=true"]


def program(folder: Path, module: str, name: str, call: str) -> list[str]:
    """A command that declares the algorithm, then runs an entry point."""
    path = folder / f"{module}.py"
    path.write_text(PROGRAM.format(module=module, name=name, call=call), encoding="utf-8")
    return [sys.executable, str(path)]


def output(folder: Path, command: list[str]) -> str:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _lengths(outputs: list[str], **_: object) -> list[float]:
    return [float(len(output)) for output in outputs]


def by_api(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALGORITHMS, KIN.name, KIN)
        settings = megarl.default_config(KIN.name, *SETTINGS, f"run.dir={folder / 'run'}")
        trained = megarl.train(reward_fn=_lengths, prompts=["a", "b", "c", "d"], config=settings)
        assert trained.summary["status"] == "finished"
        assert trained.config.rollout.n == 4
        config, _ = compose("ppo", [*SETTINGS, f"run.dir={folder / 'run'}"])
        with refused(CheckpointError, key="train_kin", offers={"run.resume": ["never"]}, names=("train_ppo",)):
            train("ppo", config)


def test_one_declaration_is_enough_for_a_call(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, by_api, tmp_path)


@pytest.mark.gate
def test_one_declaration_is_enough_for_a_command_and_a_plan(worlds: Worlds, tmp_path: Path) -> None:
    command = program(tmp_path, "training", "command", "command(KIN.name)()")
    begun = time.monotonic()
    assert KIN.about in output(tmp_path, [*command, "--help"])
    assert time.monotonic() - begun < 10, "torch is not imported for it"  # two seconds where nothing else runs
    planned = output(
        tmp_path,
        [*program(tmp_path, "plan", "main", "main()"), "algorithm=kin", "+conf=gpt20b", "cluster.gpus=64", "--json"],
    )
    assert json.loads(planned)["algorithm"] == "kin"
    output(tmp_path, [*command, *SETTINGS, f"run.dir={tmp_path / 'run'}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 1)
