"""What a resume takes from where: every key has its rule, and what differs is said or refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import megarl
from megarl.config.algorithms import ALGORITHMS
from megarl.config.ilql import ILQLConfig
from megarl.config.leaf import leaves
from megarl.config.ppo import CriticConfig, PPOConfig, PPOSettings, SeparateCriticConfig
from megarl.config.resume import (
    CHECKPOINT,
    NOW,
    REFUSED,
    RULES,
    TABLE,
    Difference,
    differences,
    from_plain,
    refuse,
    rows,
    told,
)
from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.clone import CloneConfig
from megarl.config.sections.health import PPOHealthConfig
from megarl.config.sections.model import EncoderConfig, ExpertsConfig, ModelConfig, RopeScalingConfig
from megarl.config.sections.trainer import PhaseTrainerConfig
from megarl.config.sft import SFTConfig
from megarl.errors import CheckpointError
from tests.refusals import refused


def test_every_key_of_every_training_entry_has_one_rule_and_no_rule_is_of_a_key_that_is_gone() -> None:
    named = Counter(key for rule in RULES for key in rule.keys)
    keys = {leaf.key for algorithm in ALGORITHMS.values() for leaf in leaves(algorithm.config)}
    assert named.keys() == keys, "say in megarl/config/resume.py what a resume does with a new key"
    assert max(named.values()) == 1
    assert {rule.kind for rule in RULES} == {NOW, CHECKPOINT, REFUSED}


def test_the_table_of_the_page_is_current() -> None:
    page = Path(megarl.__file__).resolve().parents[1] / "docs" / "checkpoints.md"
    assert "\n".join(rows()) in page.read_text(encoding="utf-8"), "put in what python -m megarl.config.resume prints"


def cloning(**sections: Any) -> PPOConfig:
    return PPOConfig(clone=CloneConfig(data=["samples.jsonl"]), **sections)


def found(tree: Any, **changed: Any) -> list[Difference]:
    """Differences of a run whose keys (dots as two underscores) were changed from the defaults."""
    before, now = asdict(tree()), asdict(tree())
    for key, value in changed.items():
        node, *rest = key.split("__")
        target = now
        for part in rest:
            target, node = target[node], part
        target[node] = value
    return differences(before, before, now, tree=type(tree()), same_tokenizer=True)


def test_nothing_is_said_where_nothing_differs() -> None:
    assert found(PPOConfig) == []
    assert told(found(PPOConfig, run__resume="never")) == ""


@pytest.mark.parametrize("key", [key for key, rule in TABLE.items() if rule.kind == REFUSED])
def test_what_cannot_change_is_refused_by_key_old_and_new_value(key: str) -> None:
    tree: type = ILQLConfig if key.startswith("ilql") else PPOConfig
    *sections, name = key.split(".")
    before, now = asdict(tree()), asdict(tree())
    for plain in (before, now):
        plain["model"] |= {"vocab_size": 64, "rope_scaling": asdict(RopeScalingConfig("linear"))}
        plain["model"] |= {"encoder": asdict(EncoderConfig(num_layers=2)), "experts": asdict(ExpertsConfig(count=4))}
        plain["adapter"] = asdict(AdapterConfig())
    holder = now
    for section in sections:
        holder = holder[section]
    holder[name] = "other"
    changed = differences(before, before, now, tree=tree, same_tokenizer=sections != ["tokenizer"])
    assert [difference.key for difference in changed] == [key]
    offers = {key: [changed[0].old]}
    with refused(
        CheckpointError, key=key, value="other", where="RUN/step-1", offers=offers, names=("run.resume=never",)
    ):
        refuse(changed, "RUN/step-1")


def test_what_differs_is_said_with_both_values_and_where_it_comes_from() -> None:
    changed = found(cloning, ppo__kl_coef=0.01, clone__steps=7)
    refuse(changed, "RUN/step-1")
    line = told(changed)
    assert f"ppo.kl_coef: 0.05 -> 0.01 ({NOW}" in line
    assert f"clone.steps: 400 -> 7 ({CHECKPOINT}" in line
    assert "\n" not in line


def test_what_only_a_start_uses_is_compared_with_the_start_of_the_line() -> None:
    """A run resumed with other clone.steps saves those, and they never were in force."""
    first, second = asdict(cloning()), asdict(cloning())
    second["clone"]["steps"], second["optim"]["lr"] = 7, 1.0
    keys = [change.key for change in differences(second, first, second, tree=PPOConfig, same_tokenizer=True)]
    assert keys == ["clone.steps"]


def test_the_same_shape_in_other_words_is_no_difference() -> None:
    assert found(SFTConfig, model__num_kv_heads=4, model__head_dim=32, model__ffn_size=512, model__vocab_size=259) == []


def test_the_same_tokenizer_elsewhere_is_no_difference() -> None:
    before, now = asdict(SFTConfig()), asdict(SFTConfig())
    now["tokenizer"]["path"] = "moved"
    assert differences(before, before, now, tree=SFTConfig, same_tokenizer=True) == []
    assert [change.key for change in differences(before, before, now, tree=SFTConfig, same_tokenizer=False)] == [
        "tokenizer.path"
    ]


def test_a_tokenizer_whose_file_changed_is_refused_too() -> None:
    plain = asdict(SFTConfig())
    plain["tokenizer"]["path"] = "words"
    with refused(CheckpointError, key="tokenizer.path", value="words", offers={"tokenizer.path": ["words"]}):
        refuse(differences(plain, plain, plain, tree=SFTConfig, same_tokenizer=False), "RUN/step-1")


@pytest.mark.parametrize(("old", "shown"), [("words", "words"), (None, "null")])
def test_the_remedy_for_another_tokenizer_is_the_old_value(old: str | None, shown: str) -> None:
    before, now = asdict(SFTConfig()), asdict(SFTConfig())
    before["tokenizer"]["path"], now["tokenizer"]["path"] = old, "others"
    data = {"key": "tokenizer.path", "value": "others", "offers": {"tokenizer.path": [old]}}
    with refused(CheckpointError, **data, names=(f"tokenizer.path={shown}",)):
        refuse(differences(before, before, now, tree=SFTConfig, same_tokenizer=False), "RUN/step-1")


@pytest.mark.parametrize(
    ("old", "new", "same", "said"),
    [
        ("a.jinja", "a.jinja", False, "data.chat_template: a.jinja -> a.jinja (with other content"),
        ("a.jinja", "moved.jinja", True, ""),
        ("a.jinja", "b.jinja", None, "data.chat_template: a.jinja -> b.jinja ("),
        (None, "b.jinja", False, "data.chat_template: None -> b.jinja ("),
    ],
)
def test_chat_templates_are_compared_by_what_their_files_hold(
    old: str | None, new: str, same: bool | None, said: str
) -> None:
    before, now = asdict(SFTConfig()), asdict(SFTConfig())
    before["data"]["chat_template"], now["data"]["chat_template"] = old, new
    line = told(differences(before, before, now, tree=SFTConfig, same_tokenizer=True, same_template=same))
    assert line.startswith(said)
    assert bool(line) == bool(said)


def test_keys_that_another_version_had_are_passed_over() -> None:
    before = asdict(SFTConfig())
    del before["optim"]["beta1"], before["export"]
    before["optim"]["gone"] = 1
    assert differences(before, before, asdict(SFTConfig()), tree=SFTConfig, same_tokenizer=True) == []
    assert from_plain(SFTConfig, before) == SFTConfig()


OLD_LOGGER = {
    "tensorboard": True,
    "csv": True,
    "wandb": False,
    "wandb_project": "megarl",
    "wandb_mode": "online",
    "mlflow": False,
    "mlflow_uri": None,
}


def changed_since(old: dict[str, Any], now: PPOConfig) -> dict[str, tuple[Any, Any]]:
    before = asdict(PPOConfig()) | old
    found = differences(before, before, asdict(now), tree=PPOConfig, same_tokenizer=True)
    return {difference.key: (difference.old, difference.new) for difference in found}


def test_a_section_that_was_off_and_one_that_is_null_are_the_same() -> None:
    off = {"data": [], "steps": 20, "lr": 1e-3}
    assert changed_since({"clone": off, "logger": OLD_LOGGER}, PPOConfig()) == {}
    assert changed_since({}, PPOConfig(clone=CloneConfig(steps=3))) == {}


def test_a_section_that_one_run_has_is_one_difference() -> None:
    on = asdict(CloneConfig(["a.jsonl"]))
    assert changed_since({"clone": on}, PPOConfig()) == {"clone": (on, None)}
    assert changed_since({}, PPOConfig(clone=CloneConfig(["a.jsonl"]))) == {"clone": (None, on)}
    wandb = {"project": "megarl", "mode": "online"}
    assert changed_since({"logger": OLD_LOGGER | {"wandb": True}}, PPOConfig()) == {"logger.wandb": (wandb, None)}


def test_keys_of_an_older_version_are_compared_under_their_new_names() -> None:
    old = {"kind": "separate", "path": None, "lr": 0.5, "warmup_phases": 0}
    now = PPOConfig(critic=CriticConfig("separate", SeparateCriticConfig(lr=0.25)))
    assert changed_since({"critic": old}, now) == {"critic.separate.lr": (0.5, 0.25)}
    assert from_plain(PPOConfig, {"critic": old}).critic.settings == SeparateCriticConfig(lr=0.5)
    assert changed_since({"critic": old | {"kind": "shared", "lr": None}}, PPOConfig()) == {}


def test_a_moved_key_is_compared_although_its_old_default_is_dropped() -> None:
    invariants, peak = ("health.invariants", "strict", "warn"), ("health.peak_tflops", None, 300.0)
    now = PPOConfig(health=PPOHealthConfig(["kl_runaway"], 300.0, "warn"))
    trainer = asdict(PhaseTrainerConfig()) | {"peak_tflops": None}
    old = {"trainer": trainer, "ppo": asdict(PPOSettings()) | {"invariants": "strict"}}
    watched = old | {"health": {"stop_on": ["kl_runaway"]}}
    assert changed_since(watched, now) == {key: (before, after) for key, before, after in (invariants, peak)}
    assert changed_since(old | {"health": None}, PPOConfig()) == {}
    assert from_plain(PPOConfig, old | {"health": None}).health is None
    set_then = {"trainer": trainer | {"peak_tflops": 300.0}, "ppo": old["ppo"] | {"invariants": "warn"}, "health": None}
    assert changed_since(set_then, now) == {"health.stop_on": ([], ["kl_runaway"])}


OLD_ROPE = {
    "rope_scaling": "none",
    "rope_factor": 1.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_positions": None,
}


def test_rope_scaling_of_an_older_version_is_compared_as_a_section() -> None:
    def changed(old: dict[str, Any], now: RopeScalingConfig | None) -> dict[str, tuple[Any, Any]]:
        model = asdict(PPOConfig())["model"]
        del model["rope_scaling"]
        return changed_since({"model": model | OLD_ROPE | old}, PPOConfig(model=ModelConfig(rope_scaling=now)))

    yarn = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 64}
    same = RopeScalingConfig("yarn", 4.0, original_positions=64)
    assert changed({}, None) == {}
    assert changed(yarn, same) == {}
    assert from_plain(PPOConfig, {"model": OLD_ROPE | yarn}).model.rope_scaling == same
    assert from_plain(PPOConfig, {"model": OLD_ROPE}).model.rope_scaling is None
    assert changed(yarn, replace(same, factor=2.0)) == {"model.rope_scaling.factor": (4.0, 2.0)}
    assert changed(yarn, replace(same, low_freq_factor=2.0)) == {"model.rope_scaling.low_freq_factor": (1.0, 2.0)}
    assert changed(yarn, None) == {"model.rope_scaling": (asdict(same), None)}
    assert changed({}, same) == {"model.rope_scaling": (None, asdict(same))}
    assert Difference("model.rope_scaling", asdict(same), None).rule.kind == REFUSED


def test_the_remedy_for_a_section_is_its_keys() -> None:
    difference = Difference("clone", {"data": ["a"], "steps": 4, "lr": 0.1}, None)
    assert difference.remedy == "clone.data=['a'] clone.steps=4 clone.lr=0.1"
    assert Difference("clone", None, {}).remedy == "clone=null"


def test_a_checkpoint_that_is_older_than_the_kinds_of_advantages_is_of_the_one_there_was() -> None:
    before, now = asdict(PPOConfig()), asdict(PPOConfig())
    del before["ppo"]["advantages"]
    assert differences(before, before, now, tree=PPOConfig, same_tokenizer=True) == []
    now["ppo"]["advantages"] = "grpo"
    (change,) = differences(before, before, now, tree=PPOConfig, same_tokenizer=True)
    assert (change.key, change.old, change.new, change.rule.kind) == ("ppo.advantages", "gae", "grpo", REFUSED)


def test_a_checkpoint_that_is_older_than_the_kinds_of_optimizers_is_of_adamw() -> None:
    before, now = asdict(SFTConfig()), asdict(SFTConfig())
    del before["optim"]["kind"], before["optim"]["momentum"]
    assert differences(before, before, now, tree=SFTConfig, same_tokenizer=True) == []
    now["optim"]["kind"] = "sgd"
    (change,) = differences(before, before, now, tree=SFTConfig, same_tokenizer=True)
    assert (change.key, change.old, change.new, change.rule.kind) == ("optim.kind", "adamw", "sgd", REFUSED)


@pytest.mark.parametrize(("old", "new", "kind"), [(0.9, 0.8, NOW), (0.0, 0.9, REFUSED), (0.9, 0.0, REFUSED)])
def test_momentum_can_change_and_cannot_be_switched(old: float, new: float, kind: str) -> None:
    before, now = asdict(SFTConfig()), asdict(SFTConfig())
    before["optim"] |= {"kind": "sgd", "momentum": old}
    now["optim"] |= {"kind": "sgd", "momentum": new}
    (change,) = differences(before, before, now, tree=SFTConfig, same_tokenizer=True)
    assert (change.key, change.rule.kind) == ("optim.momentum", kind)
    if kind == REFUSED:
        offers = {"optim.momentum": [old]}
        with refused(CheckpointError, key="optim.momentum", value=new, where="RUN/step-1", offers=offers):
            refuse([change], "RUN/step-1")


def test_kinds_of_critics_are_compared_as_far_as_there_is_one() -> None:
    before, now = asdict(PPOConfig()), asdict(PPOConfig())
    for plain in (before, now):
        plain["ppo"]["advantages"] = "grpo"
    now["critic"]["kind"] = "none"
    assert differences(before, before, now, tree=PPOConfig, same_tokenizer=True) == []


def test_an_action_mask_can_change_and_cannot_be_switched() -> None:
    off, on, other = (asdict(PPOConfig()) for _ in range(3))
    older = asdict(PPOConfig())
    del older["ppo"]["action_mask"]
    on["ppo"]["action_mask"] = {"top_p": 0.9, "refresh_every": 5}
    other["ppo"]["action_mask"] = {"top_p": 0.8, "refresh_every": 5}
    (change,) = differences(on, on, other, tree=PPOConfig, same_tokenizer=True)
    assert (change.key, change.rule.kind) == ("ppo.action_mask.top_p", NOW)
    for before, now in ((off, on), (on, off), (older, on)):
        (change,) = differences(before, before, now, tree=PPOConfig, same_tokenizer=True)
        assert (change.key, change.rule.kind) == ("ppo.action_mask", REFUSED)
    assert differences(older, older, off, tree=PPOConfig, same_tokenizer=True) == []
