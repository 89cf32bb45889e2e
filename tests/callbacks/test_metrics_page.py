import re
from pathlib import Path

import pytest
import torch

import megarl
from megarl.algorithms.corrections import importance_weights
from megarl.config.algorithms import ALGORITHMS
from megarl.config.findings import FINDINGS
from megarl.report.definitions import definitions

FAMILY = "(?:train|eval|perf|rollout|policy|value)"
PACKAGE = Path(megarl.__file__).parent
PAGE = PACKAGE.parent / "docs" / "metrics.md"
OF_THE_RUN = ("data_repeated",)  # findings that no metric shows


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


def test_every_statistic_of_the_correction_is_defined():
    ones = torch.ones(1, 2)
    _, stats = importance_weights(ones, ones, ones)
    defined = {name for each in definitions() for name in each.names if name.startswith("correction/")}
    assert defined == {f"correction/{name}" for name in stats}


@pytest.mark.parametrize("name", FINDINGS)
def test_the_entry_of_a_metric_names_the_findings_that_it_shows(name):
    """Each finding is a heading of docs/findings.md, and the entry of a metric that it is about links it."""
    page = PAGE.with_name("findings.md").read_text()
    assert f"### `{name}`\n" in page
    assert f"(findings.md#{name})" in PAGE.read_text() or name in OF_THE_RUN


def test_no_name_is_defined_that_is_not_logged():
    assert names_on_page() - names_in_code() == set()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_says_what_every_algorithm_logs(name):
    assert re.search(rf"\b{name}\b", PAGE.read_text(), flags=re.IGNORECASE), f"{PAGE} says nothing of {name}"
