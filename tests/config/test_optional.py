"""Optional sections: null until something sets one of their keys, wherever the key comes from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import megarl
from megarl.config.compose import compose, run, typed
from megarl.config.sections.clone import CloneConfig
from megarl.config.sections.logger import WandbConfig
from megarl.config.settings import UnknownKeyError
from megarl.errors import ConfigError
from tests.refusals import refused

Preset = Callable[..., None]


def clone(*argv: str) -> CloneConfig | None:
    found: CloneConfig | None = compose("ppo", list(argv))[0].clone
    return found


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["clone.steps=3"], CloneConfig(steps=3)),
        (["+clone.steps=3"], CloneConfig(steps=3)),
        (["clone={steps: 3}"], CloneConfig(steps=3)),
        (["clone={}"], CloneConfig()),
        (["clone=null"], None),
        (["clone.steps=3", "clone=null"], None),
        (["clone.steps=3", "clone=null", "clone.lr=0.5"], CloneConfig(lr=0.5)),
        (["clone=null", "clone={}"], CloneConfig()),
    ],
)
def test_a_key_on_the_command_line_switches_a_section_on(
    argv: list[str], expected: CloneConfig | None, folder: Path
) -> None:
    assert clone(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"x": 1}),
        (["reward.options={y: 2}"], {"x": 1, "y": 2}),
        (["reward.options={}"], {}),
        (["+reward.options={ }"], {}),
        (["reward.options={}", "reward.options={y: 2}", "reward.options.z.a=3"], {"y": 2, "z": {"a": 3}}),
        (["reward.options.y=2", "reward.options={}"], {}),
    ],
)
def test_an_empty_mapping_on_the_command_line_removes_the_entries_before_it(
    argv: list[str], expected: dict[str, Any], folder: Path, preset: Preset
) -> None:
    preset("mine", "reward: {options: {x: 1}}\n")
    assert compose("ppo", ["+conf=mine", *argv])[0].reward.options == expected


def test_a_key_in_a_preset_switches_a_section_on_and_null_off(folder: Path, preset: Preset) -> None:
    preset("on", "clone: {steps: 3}\nlogger: {wandb: {}}\n")
    preset("off", "clone: null\n")
    preset("empty", "clone: {}\n")
    assert clone("+conf=on") == CloneConfig(steps=3)
    assert clone("+conf=on", "clone.lr=0.5") == CloneConfig(steps=3, lr=0.5)
    assert clone("+conf=on", "clone=null") is None
    assert clone("+conf=[on,off]") is None
    assert clone("+conf=[off,on]") == CloneConfig(steps=3)
    assert clone("+conf=off", "clone.lr=0.5") == CloneConfig(lr=0.5)
    assert clone("+conf=empty") == CloneConfig()
    assert compose("sft", ["+conf=on"])[0].logger.wandb == WandbConfig()
    assert compose("sft", ["+conf=off"])[0].logger.wandb is None, "of a section that this entry point has not"


@pytest.mark.parametrize(
    ("argument", "key", "offers"),
    [
        ("clone.stpes=3", "clone.stpes", {"clone.stpes": ["clone.steps"]}),
        ("clone.steps=many", "clone.steps", {}),
        ("clone.steps=0", "clone.steps", {}),
        ("clone=5", "clone", {}),
        ("logger.wandb=5", "logger.wandb", {}),
        ("logger.wandb.mode=of", "logger.wandb.mode", {"logger.wandb.mode": ["online", "offline"]}),
    ],
)
def test_its_keys_are_checked_as_any(argument: str, key: str, offers: dict[str, list[Any]], folder: Path) -> None:
    with refused(ConfigError, key=key, offers=offers):
        compose("ppo", [argument])


def test_jobs_of_a_multirun_have_it_each_for_themselves(folder: Path) -> None:
    seen: list[Any] = []
    with pytest.raises(SystemExit) as ended:
        run("ppo", ["-m", "clone={},null"], lambda config: seen.append(config.clone))
    assert (ended.value.code, seen) == (2, []), "PPO wants prompts"
    with pytest.raises(SystemExit) as ended:
        run("ppo", ["-m", "+conf=randomwalks", "clone.steps=3,4"], lambda config: seen.append(config.clone.steps))
    assert (ended.value.code, seen) == (0, [3, 4])
    seen.clear()
    with pytest.raises(SystemExit) as ended:
        run("sft", ["-m", "logger.wandb={},null"], lambda config: seen.append(config.logger.wandb))
    assert (ended.value.code, seen) == (0, [WandbConfig(), None])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--cfg", "job"], None),
        (["--cfg=job", "clone.steps=3"], {"data": [], "steps": 3, "lr": 1e-3}),
        (["-c", "job", "--resolve", "clone={}"], {"data": [], "steps": 400, "lr": 1e-3}),
    ],
)
def test_the_printed_configuration_has_it_null_or_whole(
    argv: list[str], expected: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("ppo", argv, lambda config: pytest.fail("must not run"))
    out, _ = capsys.readouterr()
    assert ended.value.code == 0
    printed = yaml.safe_load(out)
    assert printed["clone"] == expected
    assert printed["logger"]["wandb"] is None
    assert "???" not in out
    with pytest.raises(SystemExit):
        run("ppo", [*argv, "-p", "clone"], lambda config: pytest.fail("must not run"))
    assert yaml.safe_load(capsys.readouterr().out) == expected


def test_help_says_that_it_is_off_and_lists_its_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, shown in (([], "  clone=null  ["), (["clone.steps=3"], "  clone={}  [")):
        with pytest.raises(SystemExit):
            run("ppo", ["--help", "all", *argv], lambda config: pytest.fail("must not run"))
        out, _ = capsys.readouterr()
        assert shown in out
        assert f"  clone.steps={3 if argv else 400}  [int]" in out


def test_attributes_switch_it_on_and_off() -> None:
    config = megarl.default_config("ppo")
    assert config.clone == None  # noqa: E711
    assert not config.clone
    section = config.clone
    section.steps = 3
    section.lr = 0.5
    assert typed("ppo", config)[0].clone == CloneConfig(steps=3, lr=0.5)
    config.clone = None
    assert typed("ppo", config)[0].clone is None
    config["clone"]["steps"] = 4
    assert typed("ppo", config)[0].clone == CloneConfig(steps=4)
    assert megarl.default_config("ppo", "clone.steps=3").clone.steps == 3


def test_attributes_of_one_that_is_off_are_refused_by_key() -> None:
    config = megarl.default_config("ppo")
    for attempt in (lambda: config.clone.stpes, lambda: setattr(config.clone, "stpes", 1)):
        with refused(UnknownKeyError, key="clone.stpes", offers={"clone.stpes": ["clone.steps"]}):
            attempt()
    with refused(UnknownKeyError, key="clone.steps"):
        _ = config.clone.steps
    assert not hasattr(config.clone, "steps")
    with refused(ConfigError, key="clone.steps", value="many"):
        config.clone.steps = "many"
    assert config.clone == None  # noqa: E711


@pytest.mark.parametrize(
    "changed",
    [
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: OmegaConf.merge(config, {"seed": 2}),
    ],
    ids=["copied", "pickled", "merged"],
)
def test_copies_can_switch_it_on(changed: Callable[[Any], Any]) -> None:
    config = changed(megarl.default_config("ppo"))
    config.logger.wandb.mode = "offline"
    assert typed("ppo", config)[0].logger.wandb == WandbConfig(mode="offline")
