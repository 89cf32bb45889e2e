"""Combinations that cannot run are refused before anything is built, with the nearest values that can."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.advantages import ADVANTAGES, critic_kind, whitens, without_effect
from megarl.config.ilql import ILQLConfig
from megarl.config.leaf import or_defaults
from megarl.config.offers import Refusal, divisors, either, enforce, multiples, near, read
from megarl.config.ppo import AdaptiveKLConfig, PPOConfig, SeparateCriticConfig
from megarl.config.ppo_sections import AdaptiveEntropyConfig, DynamicSamplingConfig, OverlongConfig
from megarl.config.resources import DEMO_EVAL, DEMO_TRAIN
from megarl.config.rules import check
from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.data import MixingConfig
from megarl.config.sections.model import ModelConfig, RopeScalingConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.sections.reward import RewardCallsConfig
from megarl.config.sections.rollout import RolloutEngineConfig
from megarl.config.sft import SFTConfig
from megarl.config.shape import check_shape
from megarl.config.world import accumulation, data_parallel_size, world_size
from megarl.disk import writable
from megarl.errors import ConfigError
from tests.refusals import refused


def configured(**values: Any) -> SFTConfig:
    """A runnable configuration with some keys changed: `configured(parallel__tp=2)`."""
    config = SFTConfig()
    config.data.train = ["train.jsonl"]
    for key, value in values.items():
        section, _, name = key.partition("__")
        if not name:
            setattr(config, section, value)
            continue
        setattr(config, section, or_defaults(config, section))  # also where the section is null
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return config


own = SeparateCriticConfig
Offers = dict[str, list[Any]]


def assert_refused(world: int, config: Any, key: str, offers: Offers, names: tuple[str, ...] = ()) -> None:
    """By a key, with the value that the configuration has for it."""
    with refused(ConfigError, key=key, value=read(config, key), offers=offers, names=names):
        check(config, world)


INTO_ONE = {"adapter": AdapterConfig(), "model__path": "base", "export__peft": "same/in", "export__hf": "same"}


@pytest.mark.parametrize(
    ("world", "values"),
    [
        (1, {}),
        (4, {"parallel__tp": 2, "parallel__pp": 2}),
        (8, {"parallel__tp": 2, "parallel__pp": 2, "trainer__micro_batch_size": 4}),
        (4, {"parallel__tp": 4, "model__num_kv_heads": 2}),
        (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
        (1, {"parallel__sequence_parallel": True, "data__seq_length": 127}),
        (2, {"parallel__pp": 2, "parallel__vpp": 2}),
        (1, {"model__head_dim": 48, "model__num_heads": 3}),
        (1, {"model__num_layers_unfrozen": 0}),
        (1, {"adapter": AdapterConfig(base_bits=4), "export__peft": "adapter", "model__path": "base"}),
    ],
)
def test_what_can_run_passes(world: int, values: dict[str, Any]) -> None:
    check(configured(**values), world)


@pytest.mark.parametrize(
    ("world", "values", "key", "offers"),
    [
        (3, {"parallel__tp": 3}, "parallel.tp", {"parallel.tp": [1, 2, 4]}),
        (
            # 126 would do for 6 heads too, were a head then not 21 wide: rotary pairs need an even width.
            1,
            {"model__num_heads": 6},
            "model.num_heads",
            {"model.num_heads": [1, 2, 4, 8], "model.hidden_size": [132]},
        ),
        (
            8,
            {"model__num_heads": 24, "model__num_kv_heads": 6, "model__head_dim": 32, "parallel__tp": 4},
            "parallel.tp",
            # 3, 6, 12 and 24 suit the heads, but not the hidden size of 128.
            {"parallel.tp": [1, 2], "model.num_kv_heads": [1, 2, 4, 8]},
        ),
        (1, {"model__num_kv_heads": 3}, "model.num_kv_heads", {"model.num_kv_heads": [1, 2, 4]}),
        (
            2,
            {"parallel__tp": 2, "model__ffn_size": 301},
            "parallel.tp",
            {"parallel.tp": [1], "model.ffn_size": [300, 302]},
        ),
        (3, {"parallel__pp": 3}, "parallel.pp", {"parallel.pp": [1, 2, 4], "model.num_layers": [3, 6]}),
        (
            2,
            {"parallel__pp": 2, "parallel__vpp": 3},
            "parallel.vpp",
            {"parallel.vpp": [2], "model.num_layers": [6]},
        ),
        (1, {"parallel__vpp": 2}, "parallel.vpp", {"parallel.pp": [2], "parallel.vpp": [None]}),
        (1, {"data__seq_length": 512}, "data.seq_length", {"data.seq_length": [256], "model.max_positions": [512]}),
        (
            2,
            {"parallel__tp": 2, "parallel__sequence_parallel": True, "data__seq_length": 127},
            "data.seq_length",
            {"data.seq_length": [126, 128], "parallel.sequence_parallel": [False]},
        ),
        (1, {"model__num_layers_unfrozen": 9}, "model.num_layers_unfrozen", {"model.num_layers_unfrozen": [4]}),
        (
            # A head is 128 / 4 = 32 wide; 2 and 4 of its dimensions are 1/16 and 1/8.
            1,
            {"model__rope_percent": 0.1},
            "model.rope_percent",
            {"model.rope_percent": [0.0625, 0.125]},
        ),
        (1, {"model__rope_scaling": RopeScalingConfig("yarn")}, "model.rope_scaling.original_positions", {}),
        (
            1,
            {"model__rope_scaling": RopeScalingConfig(factor=2.0)},
            "model.rope_scaling.kind",
            {"model.rope_scaling.kind": ["linear"], "model.rope_scaling": [None]},
        ),
        (
            1,
            {"model__rope_scaling": RopeScalingConfig("llama3", low_freq_factor=4.0, original_positions=64)},
            "model.rope_scaling.low_freq_factor",
            {"model.rope_scaling.low_freq_factor": [1]},
        ),
        (
            1,
            {"model__rope_scaling": RopeScalingConfig("linear"), "model__position": "learned"},
            "model.rope_scaling.kind",
            {"model.position": ["rope"], "model.rope_scaling": [None]},
        ),
        (1, {"tokenizer__kind": "huggingface"}, "tokenizer.path", {}),
        (1, {"export__peft": "adapter"}, "export.peft", {"export.peft": [None]}),
        (1, {"adapter": AdapterConfig(), "export__peft": "adapter"}, "export.peft", {"export.peft": [None]}),
        (1, INTO_ONE, "export.peft", {"export.peft": ["same-adapter"], "export.hf": [None]}),
        (
            1,
            {"adapter": AdapterConfig(), "model__num_layers_unfrozen": 0},
            "model.num_layers_unfrozen",
            {"model.num_layers_unfrozen": [-1], "adapter": [None]},
        ),
        (1, {"adapter": AdapterConfig(base_bits=5)}, "adapter.base_bits", {"adapter.base_bits": [4, 8, 16]}),
        (
            1,
            {"optim__momentum": 0.9},
            "optim.momentum",
            {"optim.momentum": [None], "optim.kind": ["muon", "rmsprop", "sgd"]},
        ),
        (
            1,
            {"optim__kind": "lion", "optim__momentum": 0.9},
            "optim.momentum",
            {"optim.momentum": [None], "optim.kind": ["muon", "rmsprop", "sgd"]},
        ),
        (1, {"optim__kind": "muon", "optim__momentum": 0.0}, "optim.momentum", {"optim.momentum": [0.95]}),
        (1, {"data__train": []}, "data.train", {}),
        (
            1,
            {"parallel__recompute": "some"},
            "parallel.recompute",
            {"parallel.recompute": ["none", "selective", "full"]},
        ),
    ],
)
def test_a_shape_that_cannot_run_is_told_what_can(world: int, values: dict[str, Any], key: str, offers: Offers) -> None:
    assert_refused(world, configured(**values), key, offers)


def test_a_layout_that_does_not_fit_the_devices_is_told_which_number_does() -> None:
    names = ("parallel.pp=2", "trainer.devices=1", "trainer.num_nodes=1")
    assert_refused(1, configured(parallel__tp=2, parallel__pp=2), "parallel.tp", {"trainer.devices": [4]}, names)
    offers = {"trainer.devices": [2, 4], "parallel.tp": [1]}
    assert_refused(3, configured(parallel__tp=2, trainer__devices=3), "parallel.tp", offers)


def test_a_layout_that_does_not_fit_the_launchers_world_is_told_how_many_to_start() -> None:
    assert_refused(6, configured(parallel__tp=4), "parallel.tp", {"parallel.tp": [1, 2]}, ("6", "4 or 8"))


def test_a_global_batch_that_cannot_be_cut_is_told_which_sizes_can() -> None:
    offers = {"trainer.global_batch_size": [8, 16], "trainer.micro_batch_size": [3, 4, 6, 12]}
    assert_refused(1, configured(trainer__global_batch_size=12), "trainer.global_batch_size", offers)
    offers = {"trainer.global_batch_size": [32], "trainer.micro_batch_size": [1, 2, 4]}
    assert_refused(4, configured(trainer__devices=4), "trainer.global_batch_size", offers)


def test_an_interleaved_pipeline_needs_accumulation_in_rounds_of_its_stages() -> None:
    config = configured(parallel__pp=2, parallel__vpp=2, trainer__global_batch_size=24)
    offers: Offers = {
        "trainer.global_batch_size": [16, 32],
        "trainer.micro_batch_size": [3, 4, 6, 12],
        "parallel.vpp": [None],
    }
    assert_refused(2, config, "parallel.vpp", offers, ("parallel.pp=2", "trainer.global_batch_size=24"))


def test_evaluating_ones_own_training_on_the_demo_set_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    check(configured(data__train=[DEMO_TRAIN], data__eval=[DEMO_EVAL]), 1)
    check(configured(data__train=["mine.jsonl"], data__eval=["mine_too.jsonl"]), 1)
    assert caplog.messages == []
    check(configured(data__train=["mine.jsonl"], data__eval=[DEMO_EVAL]), 1)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "data.eval is the demo set while data.train is not"
    ]


def test_every_value_offered_works() -> None:
    with refused(ConfigError, key="model.num_heads", value=6) as found:
        check(configured(model__num_heads=6), 1)
    offered = found.error.offers["model.num_heads"]
    assert len(offered) > 1
    for heads in offered:
        check(configured(model__num_heads=heads), 1)


def test_a_loaded_models_shape_is_checked_when_it_is_known() -> None:
    check(configured(model__path="/weights", parallel__tp=3), 3)
    with refused(ConfigError, key="parallel.tp", value=3, offers={"parallel.tp": [1, 2, 4]}):
        check_shape(ModelConfig(), ParallelConfig(tp=3))


def test_batch_arithmetic() -> None:
    config = configured(parallel__tp=2, parallel__pp=2, trainer__micro_batch_size=2)
    assert data_parallel_size(config, 8) == 2
    assert accumulation(config, 8) == 4  # 16 / (2 * 2)


def test_the_world_is_what_the_launcher_says_else_the_devices() -> None:
    config = configured(trainer__devices=2, trainer__num_nodes=3)
    assert world_size(config, {}) == 6
    assert world_size(config, {"WORLD_SIZE": "8", "SLURM_NTASKS": "4"}) == 8
    assert world_size(config, {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}) == 4
    assert world_size(config, {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}) == 6
    assert world_size(config, {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}) == 6
    with refused(ConfigError, key="WORLD_SIZE", value="many"):
        world_size(config, {"WORLD_SIZE": "many"})


def test_auto_devices_count_gpus_and_fall_back_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_with(gpus: int) -> None:
        fake = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: gpus))
        monkeypatch.setitem(sys.modules, "torch", fake)

    torch_with(4)
    assert world_size(configured(trainer__devices="auto", trainer__num_nodes=2), {}) == 8
    assert world_size(configured(trainer__devices="auto", trainer__accelerator="cpu"), {}) == 1
    torch_with(0)
    assert world_size(configured(trainer__devices="auto"), {}) == 1
    with refused(ConfigError, key="trainer.devices", value="auto", offers={"trainer.accelerator": ["cpu"]}):
        world_size(configured(trainer__devices="auto", trainer__accelerator="gpu"), {})


def test_offers_are_only_made_when_earlier_rules_hold_too() -> None:
    def odd(config: Any, world: int) -> None:
        if config.part.size % 2 == 0:
            raise Refusal("even", key="part.size")

    def large(config: Any, world: int) -> None:
        if config.part.size < 4:
            size = config.part.size
            raise Refusal(
                f"part.size={size} is small", {"part.size": range(1, 9)}, "patience", key="part.size", value=size
            )

    config = SimpleNamespace(part=SimpleNamespace(size=3))
    with refused(ConfigError, key="part.size", value=3, offers={"part.size": [5, 7]}) as found:
        enforce([odd, large], config, 1)
    assert found.line == "part.size=3 is small: use part.size=5 or 7, or patience"
    assert config.part.size == 3


def test_numbers_near_a_number() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert multiples(8, 12) == [8, 16]
    assert multiples(8, 3) == [8]
    assert near([1, 2, 4, 8, 16, 32, 64], 3) == [1, 2, 4, 8]
    assert either([1]) == "1"
    assert either([1, 2, None]) == "1, 2 or null"
    assert either([False]) == "false"


def phases(**values: Any) -> PPOConfig:
    """A runnable configuration of PPO with some keys changed."""
    config = PPOConfig()
    config.data.train, config.reward.fn = ["prompts.jsonl"], "rewards.py:score"
    for key, value in values.items():
        section, _, name = key.partition("__")
        if not name:
            setattr(config, section, value)
            continue
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize(
    ("world", "values"),
    [
        (1, {}),
        (1, {"adapter": AdapterConfig(), "rollout__engine": RolloutEngineConfig(layout="tp1")}),
        (1, {"adapter": AdapterConfig(base_bits=4)}),
        (4, {"parallel__tp": 2, "parallel__pp": 2}),
        (1, {"ppo__rollouts": 12, "rollout__n": 4}),
        (1, {"critic__kind": "separate", "critic__separate": own(lr=1e-4, path="/weights", warmup_phases=3)}),
        (1, {"ppo__advantages": "grpo", "rollout__n": 8}),
        (1, {"ppo__advantages": "rloo", "rollout__n": 2, "critic__kind": "separate", "critic__separate": own(lr=1e-4)}),
        (1, {"ppo__advantages": "remax", "critic__kind": "none", "critic__separate": own(path="/weights")}),
        (1, {"reward__calls": RewardCallsConfig(9000.0)}),
        (2, {"reward__calls": RewardCallsConfig(9000.0), "parallel__timeout_s": 20_000}),
        (1, {"ppo__kl_coef": 0.0}),
        (1, {"ppo__adaptive_kl": AdaptiveKLConfig(1.0), "ppo__kl_limit": 10.0}),
        (1, {"ppo__kl_coef": 0.0, "ppo__adaptive_kl": AdaptiveKLConfig(None, 2.0)}),
        (1, {"model__path": "/weights", "rollout__max_new_tokens": 4000}),
    ],
)
def test_phases_that_can_run_pass(world: int, values: dict[str, Any]) -> None:
    check(phases(**values), world)


@pytest.mark.parametrize(
    ("world", "values", "key", "offers"),
    [
        (1, {"data__train": []}, "data.train", {}),
        (1, {"reward__fn": None}, "reward.fn", {}),
        (
            1,
            {"adapter": AdapterConfig(base_bits=8), "rollout__engine": RolloutEngineConfig(layout="tp1")},
            "adapter.base_bits",
            {"rollout.engine.layout": [None], "adapter.base_bits": [16]},
        ),
        (
            1,
            {"ppo__rollouts": 10, "rollout__n": 4},
            "ppo.rollouts",
            {"ppo.rollouts": [8, 12], "rollout.n": [1, 2, 5, 10]},
        ),
        (1, {"rollout__temperature": 0.0}, "rollout.temperature", {}),
        (
            1,
            {"rollout__max_new_tokens": 256},
            "rollout.max_new_tokens",
            {"rollout.max_new_tokens": [255], "model.max_positions": [257]},
        ),
        (1, {"critic__separate": own(path="/weights")}, "critic.separate.path", {"critic.kind": ["separate"]}),
        (1, {"critic__separate": own(lr=1e-4)}, "critic.separate.lr", {"critic.kind": ["separate"]}),
        (1, {"critic__separate": own(warmup_phases=1)}, "critic.separate.warmup_phases", {"critic.kind": ["separate"]}),
        (
            1,
            {"critic__kind": "separate", "critic__separate": own(warmup_phases=100)},
            "critic.separate.warmup_phases",
            {"critic.separate.warmup_phases": [99]},
        ),
        (
            1,
            {"critic__kind": "none"},
            "critic.kind",
            {
                "critic.kind": ["shared", "separate"],
                "ppo.advantages": ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "opo"],
            },
        ),
        (
            1,
            {"ppo__advantages": "grpo", "ppo__rollouts": 6},
            "rollout.n",
            {"rollout.n": [2, 3, 6], "ppo.advantages": ["gae", "reinforce_pp", "remax"]},
        ),
        (
            1,
            {"ppo__advantages": "remax", "ppo__whiten_rewards": True},
            "ppo.whiten_rewards",
            {"ppo.whiten_rewards": [False]},
        ),
        (
            2,
            {"reward__calls": RewardCallsConfig(200.0), "trainer__devices": 2},
            "reward.calls.timeout",
            {"parallel.timeout_s": [760]},
        ),
        (1, {"ppo__kl_coef": 0.0, "ppo__kl_limit": 5.0}, "ppo.kl_limit", {"ppo.kl_limit": [None]}),
        (
            1,
            {"ppo__kl_coef": 0.0, "ppo__adaptive_kl": AdaptiveKLConfig(5.0)},
            "ppo.adaptive_kl.target",
            {"ppo.adaptive_kl.target": [None]},
        ),
        (1, {"ppo__adaptive_kl": AdaptiveKLConfig(5.0, 2.0)}, "ppo.adaptive_kl.horizon", {}),
        (1, {"model__dropout": 0.1}, "model.dropout", {"model.dropout": [0.0]}),
        (
            1,
            {"trainer__global_batch_size": 12},
            "trainer.global_batch_size",
            {"trainer.global_batch_size": [8, 16], "trainer.micro_batch_size": [3, 4, 6, 12]},
        ),
        (3, {"parallel__tp": 3}, "parallel.tp", {"parallel.tp": [1, 2, 4]}),
    ],
)
def test_phases_that_cannot_run_are_told_what_can(world: int, values: dict[str, Any], key: str, offers: Offers) -> None:
    assert_refused(world, phases(**values), key, offers)


def test_keys_that_the_kind_of_advantages_does_not_read_are_named() -> None:
    assert without_effect(phases(critic__kind="separate", critic__separate=own(lr=1e-4), ppo__lam=0.9)) == {}
    plain = phases(ppo__advantages="grpo", rollout__n=8)
    assert without_effect(plain) == {}
    assert critic_kind(plain) == "none"
    found = phases(
        **{
            "ppo__advantages": "grpo",
            "critic__kind": "separate",
            "critic__separate": own(lr=1e-4),
            "ppo__lam": 0.9,
            "ppo__gamma": 0.9,
        }
    )
    ignored = ["ppo.gamma", "ppo.lam", "critic.kind", "critic.separate.lr"]
    assert without_effect(found) == {"ppo.advantages=grpo": ignored}
    assert without_effect(phases(ppo__advantages="reinforce_pp", critic__kind="none", ppo__gamma=0.9)) == {}


def test_keys_that_the_objective_does_not_read_are_named() -> None:
    ratio = {"ppo__clip_high": 0.3, "ppo__ratio": "sequence"}
    assert without_effect(phases(**ratio)) == {}
    assert without_effect(phases(ppo__objective="cispo", **ratio)) == {}
    assert without_effect(phases(ppo__objective="plain", **ratio)) == {
        "ppo.objective=plain": ["ppo.clip_high", "ppo.ratio"]
    }


def test_sections_without_their_target_are_named() -> None:
    assert without_effect(phases(ppo__adaptive_kl=AdaptiveKLConfig())) == {
        "ppo.adaptive_kl.target=null": ["ppo.adaptive_kl"]
    }
    assert without_effect(phases(ppo__adaptive_entropy=AdaptiveEntropyConfig(step=0.1))) == {
        "ppo.adaptive_entropy.target=null": ["ppo.adaptive_entropy"]
    }
    assert without_effect(phases(ppo__adaptive_entropy=AdaptiveEntropyConfig(target=1.0))) == {}


def test_keys_of_a_penalty_and_of_a_curriculum_that_are_off_are_named() -> None:
    buffer = {"ppo__overlong": OverlongConfig(buffer=0.5)}
    assert without_effect(phases(**buffer)) == {"ppo.overlong.penalty=0": ["ppo.overlong.buffer"]}
    assert without_effect(phases(ppo__overlong=OverlongConfig(buffer=0.5, penalty=1.0))) == {}
    constant = phases(data__mixing=MixingConfig(weights=[1.0], over_phases=5))
    assert without_effect(constant) == {"data.mixing.final_weights=[]": ["data.mixing.over_phases"]}
    assert without_effect(phases(data__mixing=MixingConfig([1.0], [2.0], over_phases=5))) == {}


@pytest.mark.parametrize("advantages", ADVANTAGES)
def test_prompts_are_replaced_only_where_responses_to_a_prompt_are_compared(advantages: str) -> None:
    config = phases(ppo__advantages=advantages, ppo__dynamic_sampling=DynamicSamplingConfig(), rollout__n=4)
    if ADVANTAGES[advantages].groups:
        check(config, 1)
        return
    comparing = [name for name, needs in ADVANTAGES.items() if needs.groups]
    offers = {"ppo.dynamic_sampling": [None], "ppo.advantages": comparing}
    assert_refused(1, config, "ppo.advantages", offers)


@pytest.mark.parametrize(("limit", "most"), [(1.15, 115), (1.0, 100), (1.999, 199), (4.0, 400)])
def test_a_phase_may_use_its_limit_of_prompts_rounded_down(limit: float, most: int) -> None:
    assert DynamicSamplingConfig(limit).most_prompts(100) == most


def test_advantages_are_whitened_by_their_kind_unless_it_is_said() -> None:
    white = [name for name in ADVANTAGES if whitens(phases(ppo__advantages=name).ppo)]
    assert white == ["gae", "reinforce_pp", "reinforce_pp_baseline"]
    assert whitens(phases(ppo__advantages="grpo", ppo__whiten_advantages=True).ppo)
    assert not whitens(phases(ppo__whiten_advantages=False).ppo)


def test_the_patience_of_others_matters_only_where_a_function_is_asked() -> None:
    config = ILQLConfig()
    config.data.train, config.parallel.timeout_s, config.trainer.devices = ["samples.jsonl"], 60, 2
    check(config, 2)
    config.metric.fn = "scores.py:score"
    with refused(ConfigError, key="reward.calls.timeout", value=60.0, offers={"parallel.timeout_s": [480]}):
        check(config, 2)


@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_a_run_folder_below_a_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(ConfigError, names=(f"run.dir={tmp_path / name} ", f"{tmp_path}/file is")):
        writable(str(tmp_path / name), "run.dir")
    writable(str(tmp_path / "new" / "run"), "run.dir")
