"""What the hooks of the documentation site do; tests/gates/test_site_browser.py looks at the site itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.docs_site import ROOT, listed, loaded_from_elsewhere, rewritten, titles_of

FORGE = "https://forge.example/megarl"


@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("[`PPO`](../megarl/modules/ppo.py#L12)", f"[`PPO`]({FORGE}/blob/main/megarl/modules/ppo.py#L12)"),
        ("[rooms](../megarl/report)", f"[rooms]({FORGE}/tree/main/megarl/report)"),
        ("[changes](../CHANGELOG.md)", "[changes](changelog.md)"),
        ("[how](../CONTRIBUTING.md#tests)", "[how](contributing.md#tests)"),
        ("[data](data.md#pairs)", "[data](data.md#pairs)"),
        ("[paper](https://arxiv.org/abs/1707.06347)", "[paper](https://arxiv.org/abs/1707.06347)"),
        ("[gone](../megarl/gone.py)", "[gone](../megarl/gone.py)"),
        ("`[not](../megarl/cli.py)`", "`[not](../megarl/cli.py)`"),
        ("![curve](curves/ppo.svg)", "![curve](curves/ppo.svg)"),
    ],
)
def test_links_that_leave_the_pages_lead_to_the_forge(link: str, becomes: str) -> None:
    assert rewritten(f"See {link}.", "docs/ppo.md", FORGE) == f"See {becomes}."


@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("[`megarl/cli.py`](../megarl/cli.py)", "`megarl/cli.py`"),
        ("[the command](../megarl/cli.py#L3)", "the command (`megarl/cli.py`)"),
    ],
)
def test_without_a_forge_they_become_text_with_the_path(link: str, becomes: str) -> None:
    assert rewritten(link, "docs/ppo.md", None) == becomes


def test_a_block_of_code_keeps_its_links() -> None:
    text = "```text\n[a](../megarl/cli.py)\n```\n"
    assert rewritten(text, "docs/ppo.md", FORGE) == text


def test_a_page_at_the_root_reaches_the_pages() -> None:
    assert rewritten("[x](docs/report.md)", "CHANGELOG.md", FORGE) == "[x](report.md)"


def test_a_link_named_by_a_file_is_named_by_the_page() -> None:
    titles = titles_of([{"Start": "index.md"}, {"Data": [{"Models": "models.md"}]}])
    assert titles == {"index.md": "Start", "models.md": "Models"}
    assert rewritten("[models.md](models.md#families)", "docs/data.md", FORGE, titles=titles) == (
        "[Models](models.md#families)"
    )


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://unpkg.com/x"></script>',
        '<img alt="" src="//images.example/x.png">',
        '<link rel="stylesheet" href="https://fonts.example/css">',
        "<style>body{background:url(https://images.example/x.png)}</style>",
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(html: str) -> None:
    assert len(loaded_from_elsewhere(html)) == 1


def test_links_that_are_only_followed_are_fine() -> None:
    assert loaded_from_elsewhere('<a href="https://arxiv.org/"></a><link rel="icon" href="x.svg"><img src="x">') == []


def test_external_links_are_listed_with_their_pages() -> None:
    assert listed({"https://b": {"x.md", "a.md"}, "https://a": {"x.md"}}) == "https://a\tx.md\nhttps://b\ta.md x.md\n"


def test_every_page_is_in_the_navigation() -> None:
    """`mkdocs build --strict` says so too, but it is not installed where the tests run."""
    navigation = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {path.name for path in Path(ROOT / "docs").glob("*.md")}
    assert set(navigation) - {"changelog.md", "contributing.md"} == pages
