"""`--help` and the reference page say everything the schema says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import megarl
from megarl.config.algorithms import entry_points
from megarl.config.compose import compose
from megarl.config.leaf import leaves
from megarl.config.reference import page
from megarl.config.sft import SFTConfig

PAGE = Path(megarl.__file__).resolve().parents[1] / "docs" / "configuration.md"
Start = Callable[..., tuple[int, str, str]]


def test_the_reference_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m megarl.config.reference > docs/configuration.md"


def documented() -> dict[str, dict[str, str]]:
    """Defaults as docs/configuration.md shows them: by entry point, by key."""
    found: dict[str, dict[str, str]] = {}
    rows: dict[str, str] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line.removeprefix("## Keys of `megarl.").rstrip("`"), {})
        cells = [cell.strip(" `") for cell in line.split("|")]
        if len(cells) == 6:
            rows[cells[1]] = cells[3]
    return found


def plain_value(plain: Any, key: str) -> Any:
    for part in key.split("."):
        plain = plain[part]
    return plain


def test_the_page_shows_what_every_entry_point_composes_to(folder: Path) -> None:
    pages = documented()
    for name, entry in entry_points().items():
        keys = [leaf.key for leaf in leaves(entry.config)]
        rows = pages[entry.program]
        assert [key for key in rows if key in keys] == keys
        _, plain = compose(name, [])
        shown: Any = OmegaConf.to_container(OmegaConf.create({key: rows[key] for key in keys}), resolve=True)
        for leaf in leaves(entry.config):
            if leaf.optional:
                assert plain_value(plain, leaf.optional) is None
                value = leaf.default
            else:
                value = plain_value(plain, leaf.key)
            text = shown[leaf.key]
            is_plain = isinstance(value, str) and not text.startswith('"')
            assert (text if is_plain else json.loads(text)) == value, f"{entry.program} {leaf.key}"


def test_help_lists_every_key_with_its_value_choices_and_meaning(start: Start, preset: Callable[..., None]) -> None:
    preset("mine", "# What mine is for.\nseed: 2\n")
    code, out, err = start("--help", "all")
    assert (code, err) == (0, "")
    for leaf in leaves(SFTConfig):
        assert f"  {leaf.key}=" in out
        assert leaf.doc in out
    assert "  model.norm=rmsnorm  [layernorm|rmsnorm]" in out
    assert "  model.path=null  [str or null]" in out
    assert "  parallel=tp2 " in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "+conf=mine What mine is for." in lines


def test_help_shows_the_values_of_the_presets_given_with_it(start: Start) -> None:
    code, out, _ = start("+conf=gpt20b", "parallel.pp=2", "-h", "model.num_layers", "parallel")
    assert code == 0
    out += start("+conf=gpt20b", "parallel.pp=2", "-h", "all")[1]
    assert out.count("model.num_layers=44  [int") == 2
    assert out.count("parallel.pp=2  [int") == 2


def test_version(start: Start) -> None:
    assert start("--version") == (0, f"megarl {megarl.__version__}\n", "")
