"""The report in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.report.page import page
from tests.gates.browsing import THEMES, assert_accessible, assert_fits_and_is_silent, show
from tests.report.made_up import made_up, write_scores
from tests.report.test_page import FINDING, HOSTILE
from tests.report.test_predicted import plan

pytestmark = pytest.mark.gate


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two long runs with everything on it."""
    folder = tmp_path_factory.mktemp("report")
    write_scores(folder / "journal", {phase: [0.0, 0.5, 1.0, phase / 50] for phase in range(50)})
    hostile = [{"phase": phase, "prompt": HOSTILE, "response": "word" * 300, "score": 1.0} for phase in (0, 5)]
    runs = [made_up(1000, folder, samples=hostile), made_up(300, Path("other"))]
    (folder / "plan.json").write_text(json.dumps(plan()))
    path = folder / "report.html"
    path.write_text(page(runs, [[FINDING], []]), encoding="utf-8")
    return path


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_the_screen_and_the_browser_complains_of_nothing(
    browser: Any, file: Path, width: int, theme: str
) -> None:
    assert_fits_and_is_silent(browser, file, width, theme)


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_serious(browser: Any, axe: str, file: Path, theme: str) -> None:
    assert_accessible(browser, axe, file, theme)


def test_a_pointer_and_the_keyboard_read_values(browser: Any, file: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, file, 1280)
    figure = browser.find_element(By.ID, "metric-rollout-score")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
    readout = figure.find_element(By.CLASS_NAME, "readout")
    ActionChains(browser).move_to_element(figure.find_element(By.CSS_SELECTOR, "svg[role=img]")).perform()
    assert readout.text.startswith("phase ")
    slider = figure.find_element(By.CLASS_NAME, "reader")
    slider.send_keys(Keys.END)
    last = made_up(1000).series("rollout/score")[-1][1]
    said = slider.get_attribute("aria-valuetext")
    assert said.startswith("phase 1000: ")
    assert float(said.split()[-1]) == pytest.approx(last, rel=1e-3)
    assert readout.text == said
    slider.send_keys(Keys.HOME)
    assert readout.text.startswith("phase 1: ")


def test_smoothing_draws_an_average_through_all_curves(browser: Any, file: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, file, 1280)
    slider = browser.find_element(By.ID, "smoothing")
    slider.send_keys(Keys.END)
    charts = browser.execute_script("return document.querySelectorAll('figure script').length")
    smoothed = browser.execute_script("return document.querySelectorAll('figure svg.smooth').length")
    assert smoothed == charts > 10
    slider.send_keys(Keys.HOME)
    assert browser.execute_script("return document.querySelectorAll('.smoothed').length") == 0


def test_a_link_to_a_folded_curve_unfolds_it(browser: Any, file: Path) -> None:
    show(browser, file, 1280)
    browser.execute_script("location.hash = '#metric-eval-pass-4'")
    assert browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done(document.getElementById('metric-eval-pass-4')"
        ".getBoundingClientRect().height > 50), 500)"
    )
