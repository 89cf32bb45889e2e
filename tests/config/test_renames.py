"""A key's old name works with a warning that says the new one, wherever the key comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import megarl
from megarl import default_config
from megarl.config.algorithms import entry_points
from megarl.config.compose import compose, run, typed
from megarl.config.ppo import AdaptiveKLConfig, PPOConfig, SeparateCriticConfig
from megarl.config.renames import RENAMES, keys, renamed_arguments, renamed_tree, rows
from megarl.config.resume import differences, from_plain
from megarl.config.rules import check
from megarl.config.sections.health import PPOHealthConfig
from megarl.config.sections.logger import MlflowConfig, WandbConfig
from megarl.config.sections.model import RopeScalingConfig
from megarl.config.sections.reward import RewardCallsConfig, RewardConfig
from megarl.config.sections.rollout import RolloutConfig, RolloutEngineConfig
from megarl.config.sections.run import BestByScoreConfig, ScoreCheckpointConfig
from megarl.errors import ConfigError
from tests.refusals import refused

Preset = Callable[..., None]


def test_the_table_of_the_page_is_current() -> None:
    page = Path(megarl.__file__).resolve().parents[1] / "docs" / "migrate.md"
    assert "\n".join(rows()) in page.read_text(encoding="utf-8"), "put in what python -m megarl.config.renames prints"


def test_every_new_key_exists_and_no_old_one_does() -> None:
    trees = [entry.config for entry in entry_points().values()]
    known = {key for tree in trees for key in keys(tree)}
    for rename in RENAMES:
        assert any(rename.concerns(tree) for tree in trees)
        assert rename.old not in known or rename.old == rename.new


@pytest.mark.parametrize(
    ("argv", "wandb", "mlflow"),
    [
        (["logger.wandb=true"], WandbConfig(), None),
        (["logger.wandb=True", "logger.wandb_project=x"], WandbConfig("x"), None),
        (["logger.wandb_project=x", "logger.wandb_mode=offline"], WandbConfig("x", "offline"), None),
        (["logger=wandb", "logger.wandb_project=x"], WandbConfig("x"), None),
        (["logger=wandb", "logger.wandb=false"], None, None),
        (["logger.wandb=false", "logger.wandb_project=x"], None, None),
        (["+logger.mlflow_uri=u"], None, MlflowConfig("u")),
        (["++logger.mlflow_uri=u", "logger.mlflow=true"], None, MlflowConfig("u")),
    ],
)
def test_old_keys_on_the_command_line(argv: list[str], wandb: Any, mlflow: Any, folder: Path) -> None:
    logger = compose("sft", argv)[0].logger
    assert (logger.wandb, logger.mlflow) == (wandb, mlflow)


def test_a_warning_says_how_it_is_written_now(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert renamed_arguments(["+critic.lr=0.125", "seed=3", "--cfg"], PPOConfig) == [
        "+critic.separate.lr=0.125",
        "seed=3",
        "--cfg",
    ]
    assert "critic.lr" in caplog.text
    assert "+critic.separate.lr=0.125" in caplog.text
    assert "seed" not in caplog.text


def test_a_warning_says_that_a_key_switches_its_section_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    renamed_arguments(["logger.wandb_project=said_here", "critic.lr=0.03125"], PPOConfig)
    switches, other = [record.getMessage() for record in caplog.records if "migrate.md" in record.getMessage()]
    assert "switches logger.wandb on" in switches
    assert "switches" not in other


def test_an_old_key_that_is_removed_is_named_by_its_new_name(folder: Path) -> None:
    with refused(ConfigError, key="logger.wandb.project"):
        compose("sft", ["~logger.wandb_project"])


def test_old_keys_are_swept_over(folder: Path) -> None:
    seen: list[Any] = []
    argv = ["-m", "logger.wandb_project=a,b", "logger.mlflow=true,false"]
    with pytest.raises(SystemExit) as ended:
        run("sft", argv, lambda config: seen.append((config.logger.wandb.project, config.logger.mlflow)))
    assert ended.value.code == 0
    assert seen == [("a", MlflowConfig()), ("a", None), ("b", MlflowConfig()), ("b", None)]


def test_old_keys_in_presets(folder: Path, preset: Preset) -> None:
    preset("old", "critic: {kind: separate, lr: 0.5}\nlogger: {wandb: true, wandb_project: x}\n")
    preset("off", "logger: {wandb: false, wandb_project: x}\n")
    config, _ = compose("ppo", ["+conf=old"])
    assert (config.critic.separate, config.logger.wandb) == (SeparateCriticConfig(lr=0.5), WandbConfig("x"))
    assert compose("ppo", ["+conf=old", "critic.separate.lr=0.25"])[0].critic.separate.lr == 0.25
    assert compose("ppo", ["+conf=old", "critic.lr=0.25"])[0].critic.separate.lr == 0.25
    assert compose("sft", ["+conf=old"])[0].logger.wandb == WandbConfig("x")
    assert compose("sft", ["+conf=[old,off]"])[0].logger.wandb is None


def test_old_keys_by_attribute() -> None:
    config = megarl.default_config("ppo", "critic.lr=0.5")
    config.critic.warmup_phases = 2
    config.logger.wandb = True
    config["logger"]["wandb_project"] = "x"
    config.logger.mlflow_uri = "u"
    found, _ = typed("ppo", config)
    assert found.critic.separate == SeparateCriticConfig(lr=0.5, warmup_phases=2)
    assert (found.logger.wandb, found.logger.mlflow) == (WandbConfig("x"), MlflowConfig("u"))
    config.logger.wandb = False
    assert typed("ppo", config)[0].logger.wandb is None


def test_an_old_and_a_new_key_with_two_values_are_refused(folder: Path, preset: Preset) -> None:
    preset("both", "critic: {lr: 0.5, separate: {lr: 0.25}}\n")
    for argv, old, new in (
        (["critic.lr=0.5", "critic.separate.lr=0.25"], "0.5", "0.25"),
        (["+conf=both"], 0.5, 0.25),
    ):
        with refused(ConfigError, key="critic.lr", value=old, offers={"critic.separate.lr": [old, new]}):
            compose("ppo", argv)
    assert compose("ppo", ["critic.lr=0.5", "critic.separate.lr=0.5"])[0].critic.separate.lr == 0.5


def test_a_tree_that_is_brought_up_to_date_is_not_changed() -> None:
    old = {"logger": {"wandb": False, "wandb_project": "x"}}
    assert renamed_tree(old, PPOConfig, warn=False) == {"logger": {"wandb": None}}
    assert old == {"logger": {"wandb": False, "wandb_project": "x"}}


WALKS = "megarl.tasks.randomwalks"


@pytest.mark.parametrize("old", ["[randomwalks]", "['randomwalks']", '["randomwalks"]'])
@pytest.mark.parametrize(
    ("entry", "train"), [("ppo", f"{WALKS}:prompts"), ("grpo", f"{WALKS}:prompts"), ("ilql", f"{WALKS}:samples")]
)
def test_the_toy_task_under_its_old_names(old: str, entry: str, train: str, folder: Path) -> None:
    argv = [f"data.train={old}", f"data.eval={old}", "data.graph_seed=1005"]
    fn = "0.5*megarl.data.randomwalks:optimality + 0.5*own.py:score"
    config, _ = compose(entry, [*argv, f"reward.fn={fn!r}", "metric.fn=megarl.data.randomwalks:optimality"])
    assert (config.data.train, config.data.eval) == ([train], [f"{WALKS}:prompts"])
    assert config.data.options == {"seed": 1005}
    assert config.reward.fn == f"0.5*{WALKS}:optimality + 0.5*own.py:score"
    assert config.metric.fn == f"{WALKS}:optimality"


def test_the_toy_task_under_its_old_names_in_a_preset_a_sweep_and_from_python(folder: Path, preset: Preset) -> None:
    preset("old", "data: {train: [randomwalks, mine.jsonl], graph_seed: 1005}\nclone: {data: [randomwalks]}\n")
    config, _ = compose("ppo", ["+conf=old"])
    assert config.data.train == [f"{WALKS}:prompts", "mine.jsonl"]
    assert (config.data.options, config.clone.data) == ({"seed": 1005}, [f"{WALKS}:walks"])
    assert renamed_arguments(["data.graph_seed=1000,1005"], PPOConfig) == ["data.options.seed=1000,1005"]
    settings = default_config("ppo")
    settings.data.graph_seed = 1005
    settings.data.train = ["randomwalks"]
    assert (settings.data.options.seed, list(settings.data.train)) == (1005, [f"{WALKS}:prompts"])


def test_an_old_checkpoints_default_graph_is_no_option() -> None:
    assert renamed_tree({"data": {"graph_seed": 1000}}, PPOConfig, warn=False) == {"data": {}}
    assert renamed_tree({"data": {"graph_seed": 1005}}, PPOConfig, warn=False) == {"data": {"options": {"seed": 1005}}}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["ppo.kl_target=6"], (6.0, 10_000.0)),
        (["ppo.kl_horizon=200", "ppo.kl_target=6"], (6.0, 200.0)),
        (["ppo.kl_target=6", "ppo.adaptive_kl.horizon=200"], (6.0, 200.0)),
        (["ppo.kl_target=null"], (None, 10_000.0)),
    ],
)
def test_a_target_of_the_kl_as_it_was_written(
    argv: list[str], expected: tuple[float | None, float], folder: Path, preset: Preset
) -> None:
    settings = compose("ppo", argv)[0].ppo
    assert (settings.kl_target, settings.kl_horizon) == expected
    preset("old", "ppo: {kl_target: 3, kl_horizon: 100}\n")
    assert compose("ppo", ["+conf=old", "ppo.adaptive_kl.target=4"])[0].ppo.adaptive_kl == AdaptiveKLConfig(4.0, 100.0)


def test_an_old_checkpoints_keys_of_the_kl_without_a_target_change_nothing() -> None:
    old = asdict(PPOConfig())
    del old["ppo"]["adaptive_kl"]
    old["ppo"] |= {"kl_target": None, "kl_horizon": 10_000.0}
    assert differences(old, old, asdict(PPOConfig()), tree=PPOConfig, same_tokenizer=True) == []


OLD_KEYS = {
    "checkpoint": {"metric": "eval/loss", "mode": "min", "keep_best": 3},
    "rollout": {"slots": 4, "cache_bytes": 100, "layout": "tp2", "cuda_graphs": True},
    "reward": {"timeout": 3.0, "retries": 0, "batch_size": 2, "devices": "1", "on_error": "drop"},
    "trainer": {"peak_tflops": 300.0},
    "ppo": {"invariants": "warn"},
}
BEST, ENGINE, CALLS, HEALTH = (
    BestByScoreConfig("eval/loss", "min", 3),
    RolloutEngineConfig(4, 100, "tp2", True),
    RewardCallsConfig(3.0, 0, 2, "1", "drop"),
    PPOHealthConfig(peak_tflops=300.0, invariants="warn"),
)


def test_keys_that_moved_into_sections_work_wherever_they_are_set(folder: Path, preset: Preset) -> None:
    def sections(config: Any) -> tuple[Any, ...]:
        return config.checkpoint.best, config.rollout.engine, config.reward.calls, config.health

    preset("old", yaml.safe_dump(OLD_KEYS))
    argv = [f"{name}.{key}={value}" for name, moved in OLD_KEYS.items() for key, value in moved.items()]
    config, _ = compose("ppo", argv)
    assert sections(config) == (BEST, ENGINE, CALLS, HEALTH)
    assert compose("ppo", ["+conf=old"])[0] == config
    settings = default_config("ppo")
    for name, moved in OLD_KEYS.items():
        for key, value in moved.items():
            setattr(settings[name], key, value)
    assert OmegaConf.to_object(settings) == config
    assert from_plain(PPOConfig, OLD_KEYS) == PPOConfig(
        checkpoint=ScoreCheckpointConfig(best=BEST),
        rollout=RolloutConfig(engine=ENGINE),
        reward=RewardConfig(calls=CALLS),
        health=HEALTH,
    )
    assert compose("generate", ["+conf=old"])[0].rollout.engine == ENGINE


@pytest.mark.parametrize(
    ("entry", "metric", "mode"),
    [("sft", "eval/loss", "min"), ("rm", "eval/loss", "min")]
    + [(entry, "eval/score", "max") for entry in ("ppo", "grpo", "rft", "ilql")]
    + [(entry, "eval/accuracy", "max") for entry in ("dpo", "kto", "orpo", "cpo")],
)
def test_an_old_mode_alone_leaves_the_metric_and_the_number_as_they_were(
    entry: str, metric: str, mode: str, folder: Path, preset: Preset
) -> None:
    def best(*argv: str) -> tuple[Any, ...]:
        settings = compose(entry, list(argv))[0].checkpoint.best_settings
        return settings.metric, settings.mode, settings.keep

    other = {"min": "max", "max": "min"}[mode]
    preset("old", f"checkpoint: {{mode: {other}}}\n")
    assert best() == best("checkpoint.best=null") == best("checkpoint.best={}") == (metric, mode, 1)
    assert best("+conf=old") == best(f"checkpoint.mode={other}") == (metric, other, 1)
    assert best("+conf=old", "checkpoint.best=null") == (metric, mode, 1)
    config = default_config(entry)
    assert config.checkpoint.best.metric == config.checkpoint.metric == metric
    assert config.checkpoint.best == None  # noqa: E711 - reading does not switch it on
    config.checkpoint.mode = other
    assert config.checkpoint.mode == config.checkpoint["mode"] == other
    assert (config.checkpoint.best.metric, config.checkpoint.best.keep) == (metric, 1)


@pytest.mark.parametrize("entry", ["sft", "ppo", "ilql", "dpo"])
def test_an_old_checkpoints_defaults_are_those_of_sections_that_are_null(entry: str) -> None:
    config, now = compose(entry, [])
    old = {name: dict(part) if isinstance(part, dict) else part for name, part in now.items()}
    best = asdict(config.checkpoint.best_settings)
    old["trainer"] |= {"peak_tflops": None}
    old["checkpoint"] |= {"metric": best["metric"], "mode": best["mode"], "keep_best": 1}
    moved = ["checkpoint.best"]
    if entry in ("ppo", "ilql"):
        old["rollout"] |= asdict(config.rollout.engine_settings)
        old["reward"] |= asdict(config.reward.call_settings)
        moved += ["rollout.engine", "reward.calls"]
    for key in moved:
        section, _, name = key.partition(".")
        del old[section][name]
    assert differences(old, old, now, tree=type(config), same_tokenizer=True) == []
    old["checkpoint"]["keep_best"] = 2
    assert [each.key for each in differences(old, old, now, tree=type(config), same_tokenizer=True)] == [
        "checkpoint.best.keep"
    ]


YARN = RopeScalingConfig("yarn", 4.0, original_positions=64)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["model.rope_scaling=yarn", "model.rope_factor=4", "model.rope_original_positions=64"], YARN),
        (["model.rope_original_positions=64", "model.rope_factor=4", "model.rope_scaling=yarn"], YARN),
        (["model.rope_scaling='yarn'", "++model.rope_factor=4", "model.rope_scaling.original_positions=64"], YARN),
        (
            ["model.rope_scaling=llama3", "model.rope_low_freq_factor=2", "model.rope_high_freq_factor=8"],
            RopeScalingConfig("llama3", low_freq_factor=2.0, high_freq_factor=8.0),
        ),
        (["model.rope_scaling=none"], None),
        (["model.rope_scaling=none", "model.rope_factor=4"], None),
        (["model.rope_factor=4", "model.rope_scaling=none"], None),
        (["model.rope_scaling=null"], None),
        (["model.rope_scaling={kind: yarn, factor: 4, original_positions: 64}"], YARN),
    ],
)
def test_rope_scaling_as_it_was_written(argv: list[str], expected: Any, folder: Path) -> None:
    assert compose("sft", argv)[0].model.rope_scaling == expected


def test_rope_scaling_as_it_was_written_in_presets(folder: Path, preset: Preset) -> None:
    preset("old", "model: {rope_scaling: yarn, rope_factor: 4, rope_original_positions: 64}\n")
    preset("off", "model: {rope_scaling: none, rope_factor: 4}\n")
    for argv, expected in (
        (["+conf=old"], YARN),
        (["+conf=off"], None),
        (["+conf=[old,off]"], None),
        (["+conf=[off,old]"], YARN),
        (["+conf=old", "model.rope_scaling=none"], None),
        (["+conf=off", "model.rope_scaling=linear"], RopeScalingConfig("linear")),
        (["+conf=old", "model.rope_factor=2"], RopeScalingConfig("yarn", 2.0, original_positions=64)),
    ):
        assert compose("ppo", argv)[0].model.rope_scaling == expected, argv


def test_rope_scaling_as_it_was_written_by_attribute() -> None:
    config = megarl.default_config("ppo")
    config.model.rope_scaling = "yarn"
    config.model.rope_factor = 4
    config["model"]["rope_original_positions"] = 64
    assert typed("ppo", config)[0].model.rope_scaling == YARN
    config.model.rope_scaling = "none"
    assert typed("ppo", config)[0].model.rope_scaling is None


def test_rope_scaling_as_it_was_written_is_swept_over(folder: Path) -> None:
    seen: list[Any] = []
    argv = ["-m", "model.rope_scaling=none,linear", "model.rope_factor=4"]
    with pytest.raises(SystemExit) as ended:
        run("sft", argv, lambda config: seen.append(config.model.rope_scaling))
    assert (ended.value.code, seen) == (0, [None, RopeScalingConfig("linear", 4.0)])


def test_a_factor_without_a_kind_had_no_effect_and_is_refused(folder: Path) -> None:
    config, _ = compose("sft", ["model.rope_factor=4"])
    with refused(ConfigError, key="model.rope_scaling.kind"):
        check(config, 1)


@pytest.mark.parametrize("argument", ["model.rope_scaling=longrope", "model.rope_scaling.kind=longrope"])
def test_a_kind_of_rope_scaling_that_never_was_is_refused_by_its_new_key(argument: str, folder: Path) -> None:
    with refused(ConfigError, key="model.rope_scaling.kind", value="longrope"):
        compose("sft", [argument])


def test_a_warning_says_how_a_kind_is_written_now(
    folder: Path, preset: Preset, caplog: pytest.LogCaptureFixture
) -> None:
    preset("linear", "model: {rope_scaling: linear}\n")
    compose("sft", ["+conf=linear"])
    assert renamed_arguments(["+model.rope_scaling=yarn"], PPOConfig) == ["+model.rope_scaling={kind:yarn}"]
    assert "write model.rope_scaling={kind:linear}" in caplog.text
    assert "write +model.rope_scaling={kind:yarn}" in caplog.text
