"""The pages of plans, comparisons and self-tests in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.parallel.layout import Layout
from megarl.planning.page import page as plan_page
from megarl.planning.plan import Remedy
from megarl.report.agreement import agreement_page
from megarl.report.differences import differences_page
from tests.conformance.test_command import RESULTS, suite_page
from tests.gates.browsing import THEMES, assert_accessible, assert_fits_and_is_silent, show
from tests.planning.test_page import planned
from tests.report.made_up import made_up, write_run
from tests.report.test_agreement import APART, SAME
from tests.report.test_differences import LOSS, OTHER

pytestmark = pytest.mark.gate
PAGES = ("plan", "differences", "selftest", "conformance")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, with everything on it."""
    folder = tmp_path_factory.mktemp("pages")
    plan = planned(Layout(pp=2, vpp=2), accumulation=32)
    runs = [[write_run(folder / f"{side}{seed}", made_up(30)) for seed in (1, 2)] for side in "ab"]
    metrics = {"train/loss": LOSS, "eval/loss": OTHER}
    texts = {
        "plan": plan_page(plan, [Remedy("parallel.tp=2", 2.0**30, fits=True)], [plan]),
        "differences": differences_page(("optim.lr=1e-3", "optim.lr=3e-3"), [1, 2], metrics, "paired", runs),
        "selftest": agreement_page("tp2 pp1 dp1", [("tp", "2")], {"loss": SAME, "logprobs": APART}),
        "conformance": suite_page(RESULTS),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_the_screen_and_the_browser_complains_of_nothing(
    browser: Any, pages: dict[str, Path], name: str, width: int, theme: str
) -> None:
    assert_fits_and_is_silent(browser, pages[name], width, theme)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(browser: Any, axe: str, pages: dict[str, Path], name: str, theme: str) -> None:
    assert_accessible(browser, axe, pages[name], theme)


def test_the_schedule_scrolls_within_itself_and_with_the_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["plan"], 360)
    drawn = browser.find_element(By.CLASS_NAME, "gantt")
    assert drawn.get_attribute("tabindex") == "0"
    assert drawn.get_attribute("aria-label") == "Passes of 32 microbatches through 2 stages"
    drawn.send_keys(Keys.ARROW_RIGHT)
    moved = "const done = arguments[1]; setTimeout(() => done(arguments[0].scrollLeft), 500)"
    assert browser.execute_async_script(moved, drawn) > 0
