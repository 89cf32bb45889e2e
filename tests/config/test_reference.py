"""`--help` and the reference page say everything the schema says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import megarl
from megarl.config.leaf import leaves
from megarl.config.reference import page
from megarl.config.schema import SFTConfig

Start = Callable[..., tuple[int, str, str]]


def test_the_reference_page_is_current() -> None:
    path = Path(megarl.__file__).resolve().parents[1] / "docs" / "configuration.md"
    assert path.read_text(encoding="utf-8") == page(), "run: python -m megarl.config.reference > docs/configuration.md"


def test_help_lists_every_key_with_its_value_choices_and_meaning(start: Start, preset: Callable[..., None]) -> None:
    preset("mine", "# What mine is for.\nseed: 2\n")
    code, out, err = start("--help")
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
    code, out, _ = start("+conf=gpt20b", "parallel.pp=2", "-h")
    assert code == 0
    assert "  model.num_layers=44  [int]" in out
    assert "  parallel.pp=2  [int]" in out


def test_version(start: Start) -> None:
    assert start("--version") == (0, f"megarl {megarl.__version__}\n", "")
