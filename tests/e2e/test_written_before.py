"""Checkpoints of earlier versions: their weights are read, and their runs go on with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarl.checkpoint import tensors
from tests.e2e.runs import final_tensors, metrics, run_ppo
from tests.worlds import Worlds

# By commit 5859cf8: one phase of a model of 8 channels, with these settings.
CHECKPOINT = Path(__file__).parent / "written_before" / "ppo_5859cf8"
SETTINGS = [
    *("model.num_layers=1", "model.hidden_size=8", "model.num_heads=2", "clone.data=[]"),
    *("ppo.rollouts=8", "ppo.inner_epochs=1", "ppo.kl_coef=0.05", "ppo.scale_scores=running", "ppo.clip_scores=null"),
    *("trainer.global_batch_size=8", "trainer.micro_batch_size=8", "reward.fn=megarl.rewards.builtin:length"),
    *("checkpoint.save_last=true", "optim.schedule=constant"),
]
# What that commit logged of the second phase, when it resumed.
SECOND_PHASE = {
    "rollout/score": 7.25,
    "rollout/kl": -0.0019881129264831543,
    "rollout/entropy": 3.1337437629699707,
    "train/loss": 4.479058742523193,
    "value/loss": 3.732548713684082,
    "train/grad_norm": 24.866302490234375,
}


def test_a_run_goes_on_from_a_checkpoint_of_an_earlier_version(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, run_ppo, tmp_path, *SETTINGS, "trainer.max_phases=2", f"run.resume={CHECKPOINT}")
    (found,) = metrics(tmp_path, *SECOND_PHASE)
    assert found == pytest.approx(tuple(SECOND_PHASE.values()), rel=1e-5, abs=2e-6)


def test_the_weights_of_a_checkpoint_of_an_earlier_version_are_read(worlds: Worlds, tmp_path: Path) -> None:
    still = ["optim.lr=0", "optim.weight_decay=0", "trainer.max_phases=1", f"model.path={CHECKPOINT}"]
    worlds.run(1, run_ppo, tmp_path, *SETTINGS, *still)
    ours, theirs = final_tensors(tmp_path), tensors(CHECKPOINT)
    names = [name for name in theirs if name.startswith("policy.") and "optimizer" not in name]
    assert len(names) > 10
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name


# By commit 6edfd7f: the same with a separate critic, which had an output layer that nothing read.
CRITIC = CHECKPOINT.parent / "ppo_critic_6edfd7f"
UNTIED = ["model.tie_embeddings=false", "critic.kind=separate", "metric.fn=null", "trainer.eval_every=null"]
WITH_CRITIC = {
    "rollout/score": 7.25,
    "rollout/kl": -0.007527589797973633,
    "value/loss": 3.3502390384674072,
    "train/grad_norm": 0.60665363073349,
}


def test_a_run_with_a_separate_critic_goes_on_without_the_output_layer_that_it_had(
    worlds: Worlds, tmp_path: Path
) -> None:
    assert "critic.output_layer.weight" in tensors(CRITIC)
    settings = [*SETTINGS, *UNTIED, "trainer.max_phases=2", f"run.resume={CRITIC}"]
    worlds.run(1, run_ppo, tmp_path, *settings)
    (found,) = metrics(tmp_path, *WITH_CRITIC)
    assert found == pytest.approx(tuple(WITH_CRITIC.values()), rel=1e-5, abs=2e-6)
    assert "critic.output_layer.weight" not in final_tensors(tmp_path)
