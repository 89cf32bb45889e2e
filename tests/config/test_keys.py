"""The keys stay few, documented and safe to instantiate."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from omegaconf import OmegaConf

from megarl.config.algorithms import entry_point, entry_points
from megarl.config.leaf import count, leaves, optional_sections, sections
from megarl.config.ppo import PPOConfig
from megarl.config.sft import SFTConfig


@pytest.mark.parametrize("entry", entry_points())
def test_an_entry_has_fewer_than_150_keys_and_each_says_what_it_is(entry: str) -> None:
    tree = entry_point(entry).config
    assert 50 < count(tree) < 150
    for section in optional_sections(tree):
        assert section.doc, section.key
        assert not set("\n|") & set(section.doc), section.key
    for leaf in leaves(tree):
        assert leaf.doc, leaf.key
        assert "\n" not in leaf.doc, leaf.key
        assert "|" not in leaf.doc, f"{leaf.key}: a bar would end the cell of the reference table"


@pytest.mark.parametrize("entry", entry_points())
def test_defaults_are_of_their_own_type_choices_and_bounds(entry: str) -> None:
    from megarl.config.values import check_values

    tree = entry_point(entry).config
    check_values(tree())
    assert OmegaConf.to_object(OmegaConf.structured(tree)) == tree()


def test_lists_are_not_shared_between_instances() -> None:
    SFTConfig().data.train.append("x")
    assert SFTConfig().data.train == []


def test_leaves_flatten_sections_and_keep_what_was_declared() -> None:
    by_key = {leaf.key: leaf for leaf in leaves(SFTConfig)}
    assert by_key["seed"].default == 1
    assert by_key["parallel.vpp"].type == "int | None"
    assert by_key["data.train"].type == "list[str]"
    assert by_key["trainer.devices"].type == "int | str"
    assert by_key["model.norm"].choices == ("layernorm", "rmsnorm")
    assert by_key["model.rope_percent"].bounds == {"above": 0, "at_most": 1}
    assert sections(SFTConfig)[:3] == ["model", "tokenizer", "parallel"]


@pytest.mark.parametrize("entry", entry_points())
def test_keys_are_counted_as_the_configuration_is_printed(entry: str) -> None:
    def counted(node: object) -> int:
        return sum(map(counted, node.values())) if isinstance(node, dict) and node else 1

    tree = entry_point(entry).config
    assert count(tree) == counted(asdict(tree()))


def test_keys_of_an_optional_section_know_it() -> None:
    by_key = {leaf.key: leaf for leaf in leaves(PPOConfig)}
    assert by_key["clone.steps"].optional == "clone"
    assert by_key["logger.wandb.mode"].optional == "logger.wandb"
    assert by_key["logger.csv"].optional == ""
    assert "clone" in sections(PPOConfig)
    assert [section.key for section in optional_sections(SFTConfig)] == [
        "model.rope_scaling",
        "model.encoder",
        "model.experts",
        "extensions",
        "adapter",
        "checkpoint.best",
        "export",
        "health",
        "logger.wandb",
        "logger.mlflow",
    ]
