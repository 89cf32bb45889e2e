"""Pretrained models of a run: each opened once and released, and the user's tree left as it is."""

import gc
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import megarl
from megarl.config.compose import compose
from megarl.models.build import vocabulary
from megarl.models.exchange.pretrained import Sources, resolve_pretrained
from megarl.models.exchange.source import HuggingFaceSource
from megarl.modules.ppo import PPO
from megarl.tokenizers import build_tokenizer
from megarl.training import train
from tests.e2e.runs import WALKS, launched
from tests.models.exchange.published import HIDDEN, VOCAB, save_published
from tests.refusals import refused
from tests.worlds import Worlds


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    save_published("llama", tmp_path / "policy")
    save_published("llama3", tmp_path / "critic")
    return tmp_path / "policy", tmp_path / "critic"


def run_and_count(run_dir: Path, policy: Path, critic: Path) -> dict[str, Any]:
    """A PPO run that clones first: what it opens, what of that is alive in its phases, and whether the tree changed."""
    opened: list[str] = []
    alive: list[int] = []
    sources: weakref.WeakSet[HuggingFaceSource] = weakref.WeakSet()
    opens, trains = HuggingFaceSource.__init__, PPO.training_step

    def count_opening(self: HuggingFaceSource, path: Path) -> None:
        opened.append(path.name)
        sources.add(self)
        opens(self, path)

    def count_alive(self: PPO, indices: torch.Tensor, batch_idx: int) -> None:
        gc.collect()
        alive.append(len(sources))
        trains(self, indices, batch_idx)

    start = [f"model.path={policy}", "critic.kind=separate", f"critic.separate.path={critic}", "clone.steps=2"]
    with launched(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceSource, "__init__", count_opening)
        patch.setattr(PPO, "training_step", count_alive)
        config, _ = compose("ppo", [*WALKS, *start, "trainer.max_phases=1", f"run.dir={run_dir}"])
        before = asdict(config)
        assert train("ppo", config) == 0
        return {"opened": sorted(opened), "alive": alive, "same": asdict(config) == before}


def test_each_source_is_opened_once_and_the_tree_is_left_as_it_is(
    folders: tuple[Path, Path], worlds: Worlds, tmp_path: Path
) -> None:
    (found,) = worlds.run(1, run_and_count, tmp_path / "run", *folders)
    assert found == {"opened": ["critic", "policy"], "alive": [0], "same": True}
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    assert (written["vocab_size"], written["hidden_size"], written["path"]) == (VOCAB, HIDDEN, str(folders[0]))


def sft(run_dir: Path, folder: Path) -> bool:
    settings = ["trainer.progress=none", "logger.tensorboard=false", "trainer.max_steps=1", "data.seq_length=32"]
    config = megarl.default_config("sft", *settings, f"run.dir={run_dir}")
    before = config.copy()
    megarl.train(str(folder), samples=["a", "b"], config=config)
    return bool(config == before)


def test_a_call_from_python_leaves_its_configuration_as_it_is(worlds: Worlds, tmp_path: Path) -> None:
    save_published("llama", tmp_path / "model", vocab_size=300)
    assert worlds.run(1, sft, tmp_path / "run", tmp_path / "model") == [True]


def test_a_resolved_tree_is_a_new_one(folders: tuple[Path, Path]) -> None:
    config, _ = compose("ppo", [f"model.path={folders[0]}", "data.train=[prompts.txt]", "reward.fn=f.py:f"])
    before = asdict(config)
    resolved, sources = resolve_pretrained(config)
    assert asdict(config) == before
    assert (resolved.model.hidden_size, resolved.model.vocab_size) == (HIDDEN, VOCAB)
    assert sources.at(str(folders[0])) is sources.at(resolved.model.path)
    assert sources.at(None) is None


def test_a_tree_without_stored_models_is_taken_as_it_is() -> None:
    config, _ = compose("sft", [])
    resolved, sources = resolve_pretrained(config)
    assert resolved is config
    assert isinstance(sources, Sources)


ENCODER_DECODER = [
    "model.encoder.num_layers=2",
    "model.position=relative",
    "model.activation=geglu",
    "tokenizer.kind=characters",
    "tokenizer.path=abc",
]


@pytest.mark.parametrize(("more", "start"), [([], 3), (["model.encoder.start_id=1"], 1)])
def test_the_decoder_of_a_new_model_starts_with_padding_unless_told(more: list[str], start: int) -> None:
    """A letter as the start token could not be told from the same letter at the beginning of a response."""
    config, _ = compose("sft", [*ENCODER_DECODER, *more])
    before = asdict(config)
    resolved, _ = resolve_pretrained(config)
    assert resolved.model.encoder.start_id == start
    assert asdict(config) == before


def test_a_start_token_outside_of_the_vocabulary_is_refused() -> None:
    config, _ = compose("sft", [*ENCODER_DECODER, "model.encoder.start_id=5"])
    with refused(key="model.encoder.start_id", value=5, offers={"model.encoder.start_id": [3, None]}):
        vocabulary(config.model, build_tokenizer("characters", "abc"))
