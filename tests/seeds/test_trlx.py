"""The examples of trlX's README, with other imports, a small local model, and a step or two of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megarl.compat import trlx
from megarl.compat.trlx import TRLConfig, default_ilql_config, default_ppo_config, default_sft_config
from megarl.compat.trlx.config import sampling
from megarl.compat.trlx.trainer import settings_of
from megarl.errors import ConfigError
from tests.refusals import refused
from tests.seeds.conftest import script
from tests.worlds import Worlds

QUIET = ("trainer.progress=none", "logger.tensorboard=false")
SIMULACRA = [
    ("Hatsune Miku, Red Dress", 7.0),
    ("a castle in the clouds, oil on canvas", 9.0),
    ("grey noise", 2.0),
    ("a red dress, pencil", 5.0),
]
"""Prompts of pictures with their ratings, as in the data set of the example."""


def little(config: TRLConfig, run: Path, *overrides: str) -> TRLConfig:
    """The configuration with a step or a phase of a small batch."""
    config.train.batch_size, config.train.total_steps, config.train.seq_length = 2, 1, 64
    config.train.checkpoint_dir = str(run)
    config.overrides = (*QUIET, *overrides)
    return config


def a_reward_function(gpt2: Path, run: Path) -> Any:
    config = little(default_ppo_config(), run)
    config.method.num_rollouts, config.method.chunk_size, config.method.ppo_epochs = 4, 2, 1
    config.method.gen_kwargs["max_new_tokens"] = 4

    trainer = trlx.train(
        str(gpt2), reward_fn=lambda samples, **kwargs: [sample.count("cats") for sample in samples], config=config
    )

    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    answered = trainer.generate(**tokenizer("Q: Who rules the world? A:", return_tensors="pt"), do_sample=True)
    greedy = [
        trainer.generate(**tokenizer("Q: 1 + 1?", return_tensors="pt"), do_sample=False, max_new_tokens=3)
        for _ in range(2)
    ]
    trainer.save_pretrained(run.parent / "folder")
    return tokenizer.decode(answered[0]), [each.tolist() for each in greedy], trainer.history


def test_using_a_reward_function(worlds: Worlds, gpt2: Path, tmp_path: Path) -> None:
    ((text, greedy, history),) = worlds.run(1, script, a_reward_function, [gpt2, tmp_path / "run"])
    assert text.startswith("Q: Who rules the world? A:")
    assert greedy[0] == greedy[1]
    assert len(greedy[0][0]) <= len("Q: 1 + 1?") + 3
    assert "rollout/score" in history[-1]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert (saved.config.model_type, saved.config.n_layer) == ("gpt2", 2)


def a_labelled_data_set(gpt2: Path, run: Path) -> Any:
    """examples/simulacra.py, and, as it runs in two processes of one model, examples/nemo_ilql_sentiments.py."""
    config = little(default_ilql_config(), run, "parallel.tp=2", "data.cache=null")
    config.train.eval_interval = 1
    config.method.gen_kwargs = {"max_new_tokens": 4, "top_k": 20, "beta": 1}
    prompts, ratings = zip(*SIMULACRA, strict=True)
    trainer = trlx.train(
        str(gpt2),
        samples=list(prompts),
        rewards=list(ratings),
        eval_prompts=["Hatsune Miku, Red Dress"] * 2,
        metric_fn=lambda samples, **kwargs: {"lengths": [float(len(sample)) for sample in samples]},
        config=config,
    )
    return trainer.trained.summary["metrics"], trainer.history


def test_using_a_reward_labelled_data_set(worlds: Worlds, gpt2: Path, tmp_path: Path) -> None:
    (metrics, history), _ = worlds.run(2, script, a_labelled_data_set, [gpt2, tmp_path / "run"])
    assert history[-1]["train/loss_q"] > 0
    assert "eval/lengths" in metrics


def a_prompt_completion_data_set(gpt2: Path, run: Path) -> Any:
    config = little(default_sft_config(), run)
    questions = [["Question: 1 + 2 Answer:", "3"], ["Question: Solve this: s=2 Answer:", "(pi ** 2)/ 6"]]
    return trlx.train(str(gpt2), samples=questions, config=config).history


def test_using_a_prompt_completion_data_set(worlds: Worlds, gpt2: Path, tmp_path: Path) -> None:
    (history,) = worlds.run(1, script, a_prompt_completion_data_set, [gpt2, tmp_path / "run"])
    assert history[-1]["train/loss"] > 0


def sentiments_of_a_t5(t5: Path, run: Path) -> Any:
    """examples/ppo_sentiments_t5.py."""
    config = little(default_ppo_config(), run)
    config.model.model_path, config.model.model_arch_type = str(t5), "seq2seq"
    config.model.num_layers_unfrozen = 1
    config.method.num_rollouts, config.method.chunk_size, config.method.ppo_epochs = 4, 2, 1
    config.method.gen_kwargs = {"max_new_tokens": 5, "do_sample": True, "top_k": 0, "top_p": 1, "eos_token_id": -1}
    trainer = trlx.train(
        reward_fn=lambda samples, prompts, outputs, **kwargs: [float(len(output)) for output in outputs],
        prompts=["the cat sat", "a good film about a river", "what is the sum?", "the house"],
        eval_prompts=["summarize: the run"] * 2,
        config=config,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    asked = tokenizer(["the cat sat", "the house is small"], padding=True, return_tensors="pt")
    greedy = trainer.generate(**asked, do_sample=False, max_length=6)
    trainer.save_pretrained(run.parent / "folder")
    return greedy, trainer.history


def test_an_encoder_decoder(worlds: Worlds, t5: Path, tmp_path: Path) -> None:
    ((greedy, history),) = worlds.run(1, script, sentiments_of_a_t5, [t5, tmp_path / "run"])
    assert "rollout/score" in history[-1]
    before, saved = (transformers.AutoModelForSeq2SeqLM.from_pretrained(one) for one in (t5, tmp_path / "folder"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    asked = tokenizer(["the cat sat", "the house is small"], padding=True, return_tensors="pt")
    theirs = saved.generate(**asked, do_sample=False, max_length=6)
    assert greedy.shape[1] <= 6
    assert greedy.tolist() == theirs.tolist()
    kept, after = before.state_dict(), saved.state_dict()
    moved = {name.rpartition(".layer.")[0] for name in kept if not kept[name].equal(after[name])}
    assert moved - {""} == {"decoder.block.1"}, "encoder and lower layers are frozen"


@pytest.mark.parametrize("given", ["causal", "seq2seq"])
def test_an_architecture_that_the_model_does_not_have_is_refused(given: str, gpt2: Path, t5: Path) -> None:
    config, other = default_sft_config(), {"causal": "seq2seq", "seq2seq": "causal"}[given]
    config.model.model_path, config.model.model_arch_type = str(t5 if given == "causal" else gpt2), given
    offers = {"model.model_arch_type": [other]}
    with refused(ConfigError, key="model.model_arch_type", value=given, offers=offers):
        trlx.train(samples=[["a", "b"]], config=config)


def test_configuring_hyperparameters() -> None:
    config = default_ppo_config()
    config.model.model_path = "EleutherAI/gpt-neox-20b"
    config.tokenizer.tokenizer_path = "EleutherAI/gpt-neox-20b"
    config.train.seq_length = 128
    config.train.batch_size = 1
    config.model.num_layers_unfrozen = 0
    config.method.chunk_size = 1
    ours = settings_of(config)
    assert (ours.trainer.global_batch_size, ours.trainer.micro_batch_size) == (1, 1)
    assert (ours.model.num_layers_unfrozen, ours.model.max_positions) == (0, 128)
    assert ours.rollout.engine.slots == 1
    assert ours.ppo.rollouts == 128
    ilql = default_ilql_config()
    ilql.method.two_qs = False
    assert settings_of(ilql).ilql.two_qs is False
    ilql.tokenizer.tokenizer_path = "another"
    assert settings_of(ilql).tokenizer.path == "another"


def test_numbers_are_per_replica_as_there() -> None:
    settings = dict(each.split("=", 1) for each in default_ppo_config().settings(replicas=4))
    assert (settings["trainer.global_batch_size"], settings["trainer.micro_batch_size"]) == ("128", "32")
    assert settings["ppo.rollouts"] == "512"
    assert settings["trainer.max_phases"] == "100", "epochs are phases; 10000 steps would be 625"


def test_a_configuration_is_read_changed_and_written() -> None:
    config = TRLConfig.from_dict(default_ilql_config().to_dict())
    assert config == default_ilql_config()
    changed = TRLConfig.update(config, {"method.tau": 0.8, "optimizer.kwargs.lr": 1e-3, "method.gen_kwargs.top_k": 5})
    assert (changed.method.tau, changed.optimizer.kwargs["lr"], changed.method.gen_kwargs["top_k"]) == (0.8, 1e-3, 5)
    assert config.method.tau == 0.7
    config.scheduler.kwargs = {"T_max": 1000, "eta_min": 5e-6}
    ours = settings_of(config)
    assert (ours.optim.schedule, ours.optim.min_lr_ratio) == ("cosine", pytest.approx(0.1))
    config.model.peft_config = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "peft_type": "LORA"}
    assert (settings_of(config).adapter.rank, settings_of(config).adapter.targets) == (4, ["c_attn"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"top_k": 0, "top_p": 1.0, "do_sample": True}, {"top_p": None, "top_k": None}),
        ({"max_length": 48, "do_sample": False}, {"max_new_tokens": 36, "temperature": 0.0}),
        ({"beta": [1, 4], "temperature": 0.5, "eos_token_id": 0}, {"ilql_beta": 1.0, "temperature": 0.5}),
    ],
)
def test_arguments_of_generate(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling(given, prompt_length=12) == expected


@pytest.mark.parametrize(
    ("mistake", "key", "names"),
    [
        (lambda: setattr(default_ppo_config().train, "seq_len", 1), "seq_len", ("seq_length",)),
        (lambda: setattr(default_ppo_config().method, "two_qs", False), "two_qs", ("PPOMethod",)),
        (lambda: sampling({"penalty_alpha": 1.0}), "gen_kwargs.penalty_alpha", ()),
        (lambda: sampling({"num_beams": 4}), "gen_kwargs.num_beams", ("4",)),
        (lambda: trlx.train("gpt2", samples=["a"], config={"train": {}}), "config", ("TRLConfig",)),  # type: ignore[arg-type]
        (
            lambda: settings_of(TRLConfig.update(default_ppo_config(), {"optimizer.name": "lion"})),
            "optimizer.name",
            ("lion",),
        ),
        (lambda: settings_of(TRLConfig(overrides=("optim.lrr=1",))), "optim.lrr", ("optim.lr",)),
    ],
)
def test_a_mistake_is_refused_in_one_line(mistake: Any, key: str, names: tuple[str, ...]) -> None:
    with refused(ConfigError, key=key, names=names):
        mistake()


def test_logging_has_the_functions_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    before = trlx.logging.get_verbosity()
    try:
        trlx.logging.set_verbosity(trlx.logging.WARNING)
        assert trlx.logging.get_verbosity() == trlx.logging.WARNING
        assert {"CRITICAL", "ERROR", "INFO", "DEBUG"} <= set(dir(trlx.logging))
        trlx.logging.disable_progress_bar()
        trlx.logging.enable_progress_bar()
        trlx.logging.enable_explicit_format()
    finally:
        trlx.logging.reset_format()
        trlx.logging.set_verbosity(before)


def test_the_example_of_the_labelled_data_is_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(default_ppo_config().to_dict()))["method"]["name"] == "PPOConfig"
