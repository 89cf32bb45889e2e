import re
from pathlib import Path

import pytest

import megarl
from megarl.config.algorithms import ALGORITHMS

FAMILY = "(?:train|eval|perf|rollout|policy|value|correction)"
PACKAGE = Path(megarl.__file__).parent
PAGE = PACKAGE.parent / "docs" / "metrics.md"


def names_in_code() -> set[str]:
    """Everything in megarl's source that is written like the name of a metric."""
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    return set(re.findall(rf"""["']({FAMILY}/[a-z0-9_]+)["'{{/]""", source))


def names_on_page() -> set[str]:
    """Headings of the page's entries."""
    headings = re.findall(r"^### (`.*)$", PAGE.read_text(), flags=re.MULTILINE)
    return {name for heading in headings for name in re.findall(rf"`({FAMILY}/[a-z0-9_]+)`", heading)}


def test_every_logged_name_is_defined():
    assert names_in_code() - names_on_page() == set()


def test_no_name_is_defined_that_is_not_logged():
    assert names_on_page() - names_in_code() == set()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_says_what_every_algorithm_logs(name):
    assert re.search(rf"\b{name}\b", PAGE.read_text(), flags=re.IGNORECASE), f"{PAGE} says nothing of {name}"
