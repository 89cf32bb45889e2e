"""The documentation site in a browser, opened as files without a server: Debian's chromium, driven by selenium.

Skipped where the site's packages (`make site` installs them), the browser or selenium are missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.doc_blocks import ROOT
from tests.gates.browsing import MISSING, THEMES, show

pytestmark = pytest.mark.gate
QUESTIONS = {
    "reward model over http": ("questions.html#how-do-i-use-my-reward-model-over-http", "reward.url="),
    "policy/clip_fraction": ("metrics.html#policyclip_fraction", "Up to 0.3"),
    "resume a run": ("questions.html#how-do-i-resume-a-run", "same run.dir"),
    "add a metric": ("questions.html#how-do-i-add-a-metric", "metric.fn="),
    "train on two nodes": ("questions.html#how-do-i-train-on-two-nodes", "sbatch --nodes=2"),
    "stop kl limit": ("questions.html#how-do-i-stop-on-a-kl-limit", "ppo.kl_limit="),
    "which tokens of a chat train": (
        "questions.html#which-tokens-of-a-chat-train",
        "which tokens of a conversation train",
    ),
    "use lora": ("adapters.html", "adapter.rank=16"),
    "convert to hugging face": ("questions.html#how-do-i-convert-a-checkpoint-to-hugging-face", "megarl convert from="),
    "memory 7b ppo": ("questions.html#what-memory-does-a-7b-ppo-need", "megarl plan +conf=llama3_8b"),
    "migrate trlx": ("questions.html#how-do-i-migrate-from-trlx-trl-easyrlhf-or-nemo-aligner", "megarl.compat"),
    "run hangs": ("questions.html#how-do-i-find-out-why-a-run-hangs", "megarl why-stuck"),
    "is my run going well": ("questions.html#is-my-run-going-well", "megarl report"),
    "math answers checked": ("rewards.html#answers-that-can-be-checked", "megarl.rewards.verifiable:"),
    "hyperparameters change first": ("questions.html#which-hyperparameters-do-i-change-first", "optim.lr"),
}
"""What a reader types, the section with the answer, and words of the answer. The section must be among the results that
a screen shows, so that the first click opens the answer."""
SHOWN = 6
SECTION = """
let part = document.getElementById(arguments[0]) || document.querySelector("article h1"), said = ""
do { said += part.textContent; part = part.nextElementSibling } while (part && (part.tagName != "H2" || !arguments[0]))
return said
"""
"""Returns the text from a heading to the next one; of a page without an anchor, all of it."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if importlib.util.find_spec("material") is None:
        pytest.skip("the site's packages are not installed: make site")
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "[x](metrics.md#nowhere)",
        "[x](nowhere.md)",
        "[x](../megarl/nowhere.py)",
        '<img src="https://images.example/x.png">',
    ],
)
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, line: str) -> None:
    """By the very command of `make site`."""
    if importlib.util.find_spec("material") is None:
        pytest.skip("the site's packages are not installed: make site")
    for source in ROOT.iterdir():
        if source.name in ("docs", "tools"):
            shutil.copytree(source, tmp_path / source.name)
        elif source.name != "site":
            (tmp_path / source.name).symlink_to(source)
    with (tmp_path / "docs" / "chat.md").open("a") as page:
        page.write(f"\n{line}\n")
    command = re.search(r"-m mkdocs (build .*)", (ROOT / "Makefile").read_text())
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *command[1].split()], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "Aborted with 1 warnings in strict mode!" in done.stdout


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [360, 1280])
def test_every_page_fits_the_screen_and_loads_nothing_from_elsewhere(
    browser: Any, site: Path, width: int, theme: str
) -> None:
    pages = sorted(page for page in site.glob("*.html") if page.name != "404.html")  # that is for servers
    assert len(pages) > 40
    grounds = set()
    for page in pages:
        show(browser, page, width, theme)
        resources = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
        assert [name for name in resources if not name.startswith("file:")] == []
        assert browser.get_log("browser") == [], page.name
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page.name
        grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 1
    assert (grounds == {THEMES["light"]}) == (theme == "light")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_search_finds_the_answer(browser: Any, site: Path, question: str) -> None:
    (place, answer), found = QUESTIONS[question], searched(browser, site / "index.html", question)
    assert place in found[:SHOWN], found[:SHOWN]
    page, _, anchor = place.partition("#")
    browser.get(f"{(site / page).as_uri()}#{anchor}")
    assert answer in browser.execute_script(SECTION, anchor)


def test_a_search_finds_the_entry_of_every_metric(browser: Any, site: Path) -> None:
    for name in ("rollout/zero_spread_groups", "value/explained_variance", "correction/ess", "perf/mfu"):
        found = searched(browser, site / "index.html", name)
        assert any(link.startswith("metrics.html#") and name.replace("/", "") in link for link in found[:SHOWN]), found


def searched(browser: Any, page: Path, text: str) -> list[str]:
    """Return the links of the results, as readers see them in their order, relative to the site."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, page, 1280)
    field = browser.find_element(By.CSS_SELECTOR, "[data-md-component=search-query]")
    browser.execute_script("arguments[0].focus()", field)
    field.send_keys(text)
    links = "[...document.querySelectorAll('.md-search-result__link')].map(each => each.href)"
    WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(f"return {links}.length"))
    settled: list[str] = []
    while (now := browser.execute_script(f"return {links}")) != settled:
        settled = now
        browser.execute_async_script("setTimeout(arguments[0], 400)")
    base = f"{page.parent.as_uri()}/"
    return [link.removeprefix(base).split("?")[0] + ("#" + link.split("#")[1] if "#" in link else "") for link in now]
