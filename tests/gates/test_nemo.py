"""NeMo 3.0.0 beside ours: its connector opens our archives and we its, and its exp_manager takes a Trainer of ours."""

import json
import os
from pathlib import Path

import pytest
import torch

from megarl.models.exchange.formats import open_source
from megarl.models.exchange.nemo_write import write_nemo
from tests.e2e.runs import SMALL, assert_same_bits, final_tensors
from tests.gates.environments import ROOT, install, make_environment, run
from tests.models.exchange.published import save_published

# NeMo 3.0.0 has no language models: this one holds whatever weights its connector hands over.
SCRIPT = """
import sys
from nemo.core.classes import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector


class GPTShell(ModelPT):
    held = None

    def load_state_dict(self, state_dict, strict=True):
        self.held = state_dict

    def state_dict(self, *args, **kwargs):
        return self.held

    def setup_training_data(self, config): pass
    def setup_validation_data(self, config): pass
    def setup_optimization(self, optim_config=None): pass
    @classmethod
    def list_available_models(cls): return []


theirs, target = sys.argv[1:]
connector = SaveRestoreConnector()
config = GPTShell.restore_from(theirs, save_restore_connector=connector, return_config=True)
del config["target"]  # the class that NeMo 1.x had, which 3.0.0 refuses to look for
model = GPTShell.restore_from(theirs, save_restore_connector=connector, override_config_path=config)
assert model.cfg.num_layers == 2, model.cfg
connector.save_to(model, target)
print("weights", len(model.held))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the extra; `MEGARL_GATE_NEMO` names the interpreter of one that is there already."""
    there = os.environ.get("MEGARL_GATE_NEMO")
    if there is not None:
        return Path(there)
    python = make_environment(tmp_path_factory.mktemp("nemo") / "venv")
    install(python, f"{ROOT}[nemo]")
    return python


@pytest.mark.gate
def test_nemo_opens_ours_and_we_open_its(python: Path, tmp_path: Path) -> None:
    save_published("llama", tmp_path / "model")
    ours, theirs = tmp_path / "ours.nemo", tmp_path / "theirs.nemo"
    source = open_source(tmp_path / "model")
    write_nemo(source, ours)
    (tmp_path / "script.py").write_text(SCRIPT)
    said = run(python, tmp_path / "script.py", ours, theirs, cwd=tmp_path, timeout=600).stdout
    assert f"weights {len(source.names)}" in said
    back = open_source(theirs)
    assert back.names == source.names
    assert [name for name in source.names if not torch.equal(back.read(name), source.read(name))] == []


@pytest.mark.gate
def test_its_exp_manager_adds_files_and_callbacks_and_changes_no_number(python: Path, tmp_path: Path) -> None:
    """A run through it leaves NeMo's files and timings behind; killed half way and resumed, the same weights."""

    def train(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        command = ["-m", "megarl.train_sft", *SMALL, f"run.dir={folder}", "checkpoint.every=2", *overrides]
        run(python, *command, cwd=ROOT, timeout=600)
        return folder

    nemo = "extensions.nemo=true"
    plain = train("plain", "trainer.max_steps=4")
    handed = train("handed", "trainer.max_steps=4", nemo)
    assert (handed / "nemo" / "cmd-args.log").is_file()
    assert_same_bits(final_tensors(handed), final_tensors(plain))
    assert sorted(path.name for path in (handed / "checkpoints").iterdir() if path.is_dir()) == sorted(
        path.name for path in (plain / "checkpoints").iterdir() if path.is_dir()
    )
    assert not list(handed.rglob("*.ckpt")), "NeMo's own checkpoints are off"
    timed = json.loads((handed / "summary.json").read_text())["metrics"]
    assert [name for name in timed if "train_step_timing" in name], sorted(timed)
    train("resumed", "trainer.max_steps=4", "trainer.max_time=00:00:00", nemo)
    resumed = train("resumed", "trainer.max_steps=4", nemo)
    assert_same_bits(final_tensors(resumed), final_tensors(plain))
