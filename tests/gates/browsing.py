"""Pages in Debian's chromium, driven by selenium. Tests are skipped where either is missing."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MISSING = [
    *(name for name in ("chromium", "chromedriver") if shutil.which(name) is None),
    *(name for name in ("selenium",) if importlib.util.find_spec(name) is None),
]
THEMES = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}


def started() -> Iterator[Any]:
    """Yield a browser, and end it."""
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def source_of_axe(folder: Path) -> str:
    """The source of axe-core, which checks how accessible a page is."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    packed = subprocess.run(["npm", "pack", "axe-core@4"], cwd=folder, capture_output=True, text=True, timeout=120)
    if packed.returncode:
        pytest.skip(f"npm cannot fetch axe-core: {packed.stderr.strip()[:200]}")
    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()


def show(browser: Any, page: Path | str, width: int, theme: str = "light") -> None:
    """Open a page, a file or an address, on a screen of this width in a theme."""
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri() if isinstance(page, Path) else page)


def unfold(browser: Any) -> None:
    """Open all that is folded."""
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")


def assert_fits_and_is_silent(browser: Any, file: Path, width: int, theme: str) -> None:
    """The page fits the screen in a theme, loads nothing, and the browser complains of nothing."""
    browser.get_log("browser")  # drop what an earlier page said
    show(browser, file, width, theme)
    unfold(browser)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == THEMES[theme]


def assert_accessible(browser: Any, axe: str, file: Path, theme: str) -> None:
    """axe-core finds nothing serious on a phone."""
    show(browser, file, 360, theme)
    unfold(browser)
    assert serious_findings(browser, axe) == []


def serious_findings(browser: Any, axe: str) -> list[tuple[str, str]]:
    """What axe finds on the open page that keeps somebody from using it: rule and HTML of the first place."""
    checked = browser.execute_async_script(f"{axe}; const done = arguments[0]; axe.run(document).then(done)")
    assert len(checked["passes"]) > 15
    serious = [each for each in checked["violations"] if each["impact"] in ("serious", "critical")]
    return [(each["id"], each["nodes"][0]["html"]) for each in serious]
