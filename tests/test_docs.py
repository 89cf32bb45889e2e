"""What the pages point at is there."""

import re
from pathlib import Path

import pytest

from tests.doc_links import ROOT, corrected, line_of

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_of_the_project_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the forge and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_sections_lead_to_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    to_pages = [(path, anchor) for path, anchor in links if not path or path.endswith(".md")]
    missing = [
        f"{path}#{anchor}" for path, anchor in to_pages if anchor not in anchors(page.parent / path if path else page)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_lines_lead_to_what_they_name(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert corrected(text) == text, "python -m tests.doc_links puts them right"


def test_a_function_is_found_in_a_module_of_its_name(tmp_path: Path) -> None:
    module = tmp_path / "algorithms" / "aggregate.py"
    module.parent.mkdir()
    module.write_text("import math\n\n\ndef aggregate() -> None: ...\n")
    assert line_of("algorithms.aggregate", module) == 4
    module.write_text("import math\n")
    with pytest.raises(ValueError, match="defines no"):
        line_of("algorithms.aggregate", module)
