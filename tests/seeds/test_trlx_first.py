"""The example of the first trlX README: a prompt pipeline, an orchestrator, and the script that trains with them.

`sentiment.py` beside this file is that example, with other imports and a small local model and data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.compat import trlx
from megarl.compat.trlx import tasks
from megarl.errors import ConfigError
from tests.refusals import refused
from tests.seeds import sentiment
from tests.seeds.conftest import script
from tests.worlds import Worlds

YAML = """
model: {{model_path: {model}, tokenizer_path: {model}, model_type: AcceleratePPOModel, num_layers_unfrozen: 1}}
train:
  seq_length: 48
  epochs: 1
  total_steps: 10000
  batch_size: 4
  lr_ramp_steps: 1
  lr_decay_steps: 79000
  learning_rate_init: 1.412e-4
  learning_rate_target: 1.412e-4
  opt_betas: [0.9, 0.95]
  weight_decay: 1.0e-6
  checkpoint_interval: 10000
  eval_interval: 16
  pipeline: PPOPipeline
  orchestrator: PPOSentimentOrchestrator
  input_size: 12
  gen_size: 20
  checkpoint_dir: {run}
method:
  name: ppoconfig
  num_rollouts: 8
  chunk_size: 4
  ppo_epochs: 2
  init_kl_coef: 0.2
  target: 6
  horizon: 10000
  gamma: 1
  lam: 0.95
  cliprange: 0.2
  cliprange_value: 0.2
  vf_coef: 2.3
  gen_kwargs: {{max_length: 20, min_length: 20, top_k: 0.0, top_p: 1.0, do_sample: true}}
overrides: [trainer.progress=none, logger.tensorboard=false, rollout.dump={run}-dump]
"""


@pytest.fixture
def config(gpt2: Path, tmp_path: Path) -> Path:
    path = tmp_path / "ppo_config.yml"
    path.write_text(YAML.format(model=gpt2, run=tmp_path / "run"))
    return path


def test_the_task_trains_as_it_is_written(worlds: Worlds, config: Path, tmp_path: Path) -> None:
    (history,) = worlds.run(1, script, sentiment.main, [str(config)])
    assert len(history) == 1, "one epoch is one phase"
    assert -1 <= history[0]["rollout/score"] <= 1
    assert history[0]["rollout/kl"] == 0, "the first phase's experience is of the weights that the model started from"
    from megarl.rollout.stored import load

    rollouts = load(tmp_path / "run-dump" / "train-000000.jsonl")
    assert len(rollouts) == 8
    assert all(len(rollout.prompt) <= 12 for rollout in rollouts), "padding is no prompt"
    assert all(len(rollout.response) <= 8 for rollout in rollouts), "max_length counts the prompt"


def test_its_yaml_means_these_keys(config: Path, gpt2: Path) -> None:
    settings = dict(each.split("=", 1) for each in trlx.TRLConfig.load_yaml(config).settings(replicas=2))
    assert settings["ppo.rollouts"] == "16"
    assert settings["trainer.global_batch_size"] == "8"
    assert settings["rollout.max_new_tokens"] == "8"
    assert settings["ppo.adaptive_kl.target"] == "6"
    assert (settings["optim.lr"], settings["optim.schedule"]) == ("0.0001412", "constant")
    assert settings["optim.beta2"] == "0.95"
    assert "tokenizer.path" not in settings, "it is the model's own"


class Silent(trlx.PPOOrchestrator):
    """Without a score."""


def test_what_a_task_lacks_is_told_in_one_line(config: Path) -> None:
    cfg = trlx.TRLConfig.load_yaml(config)
    model = trlx.get_model(cfg.model.model_type)(cfg)
    with refused(ConfigError, key="learn"):
        model.learn()
    pipeline = trlx.get_pipeline(cfg.train.pipeline)(model.tokenizer, cfg)
    Silent(pipeline, model)
    with refused(ConfigError, key="score", value="Silent"):
        model.learn()
    with refused(ConfigError, key="model.model", names=("wandb.watch",)):
        model.model  # noqa: B018
    with refused(ConfigError, key="num_rollouts", value=0):
        Silent(pipeline, model).make_experience(0)


@pytest.mark.parametrize(
    ("call", "key", "names"),
    [
        (lambda: trlx.get_pipeline("Unknown"), "pipeline", ("Unknown", "PPOPipeline")),
        (lambda: trlx.get_orchestrator("Unknown"), "orchestrator", ("PPOSentimentOrchestrator",)),
        (lambda: trlx.get_model("AccelerateILQLModel"), "model", ("AcceleratePPOModel",)),
        (lambda: trlx.register_orchestrator(len), "orchestrator", ("len", "score")),
        (lambda: trlx.register_datapipeline(type("Empty", (), {})), "pipeline", ("Empty", "__getitem__")),
        (
            lambda: trlx.register_orchestrator(type("PPOOrchestrator", (trlx.PPOOrchestrator,), {})),
            "orchestrator",
            ("PPOOrchestrator", "megarl.compat.trlx.tasks"),
        ),
        (lambda: trlx.TRLConfig.load_yaml("nowhere.yml"), "TRLConfig", ("nowhere.yml",)),
        (lambda: trlx.TRLConfig.from_dict({"train": {"batchsize": 1}}), "batchsize", ("batch_size",)),
        (lambda: trlx.TRLConfig.from_dict({"method": {"name": "nlpoconfig"}}), "method.name", ("nlpoconfig",)),
    ],
)
def test_a_wrong_name_is_refused(call: Any, key: str, names: tuple[str, ...]) -> None:
    with refused(ConfigError, key=key, names=names):
        call()


def test_a_cell_of_a_notebook_may_run_again() -> None:
    again = type("PPOPipeline", (sentiment.PPOPipeline,), {"__module__": sentiment.__name__})
    before = tasks._PIPELINES["ppopipeline"]
    try:
        assert trlx.register_datapipeline(again) is again
        assert trlx.get_pipeline("PPOPipeline") is again
    finally:
        tasks._PIPELINES["ppopipeline"] = before
