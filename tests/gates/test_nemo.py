"""NeMo's own SaveRestoreConnector opens archives of ours, and what it writes is read by us."""

from pathlib import Path

import pytest
import torch

from megarl.models.exchange.formats import open_source
from megarl.models.exchange.nemo_write import write_nemo
from tests.gates.environments import install, make_environment, run
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


@pytest.mark.gate
def test_nemo_opens_ours_and_we_open_its(tmp_path: Path) -> None:
    save_published("llama", tmp_path / "model")
    ours, theirs = tmp_path / "ours.nemo", tmp_path / "theirs.nemo"
    source = open_source(tmp_path / "model")
    write_nemo(source, ours)
    python = make_environment(tmp_path / "venv")
    install(python, "nemo_toolkit[common]==3.0.0")
    (tmp_path / "script.py").write_text(SCRIPT)
    said = run(python, tmp_path / "script.py", ours, theirs, cwd=tmp_path, timeout=600).stdout
    assert f"weights {len(source.names)}" in said
    back = open_source(theirs)
    assert back.names == source.names
    assert [name for name in source.names if not torch.equal(back.read(name), source.read(name))] == []
