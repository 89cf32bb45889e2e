"""Draws the pictures of the README: `python tools/pictures.py` runs the demo and photographs its panel and its report.

Needs chromium, chromedriver and the package selenium. The pictures are docs/images/panel.png and report.png.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI

from megarl.callbacks.panel import Paper, panel
from megarl.callbacks.progress import PanelProgress

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS, LINES = 100, 16
SHOWN_PHASE = 12  # of 20, with a curve behind it and time ahead
REPORT_SIZE = (1100, 760)


class Picture(PanelProgress):
    """Keeps the panel as it is in the middle of a run, as SVG."""

    def __init__(self) -> None:
        super().__init__(log_every=1)

    def show(self) -> None:
        """Write the panel of one phase into the current folder."""
        if self.progress.step == SHOWN_PHASE:
            console = Console(record=True, width=COLUMNS, file=io.StringIO())
            for line in panel(self.progress, Paper(COLUMNS, LINES)):
                console.print(line)
            Path("panel.svg").write_text(console.export_svg(title="megarl ppo +conf=demo", theme=MONOKAI))


def main() -> None:
    """Run the demo and write both pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, photographer() as browser:
        folder = Path(name)
        own = f"extensions.callbacks=[{Path(__file__).resolve()}:Picture]"
        command = [sys.executable, "-m", "megarl.train_ppo", "+conf=demo", "run.dir=demo", "trainer.progress=none", own]
        subprocess.run(command, cwd=folder, check=True)
        box = folder / "panel.html"
        svg = (folder / "panel.svg").read_text()
        box.write_text(f"<body style='margin:0;background:#fff'><div style='width:920px'>{svg}</div></body>")
        photograph(browser, box, 920, None, IMAGES / "panel.png")
        photograph(browser, folder / "demo" / "report.html", *REPORT_SIZE, IMAGES / "report.png", "curves")


@contextmanager
def photographer() -> Iterator[Any]:
    """Yield a browser without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def photograph(browser: Any, page: Path, width: int, height: int | None, out: Path, section: str = "") -> None:
    """Write a picture of a page.

    Args:
        browser: the browser.
        page: the file.
        width, height: of the screen; without a height, that of the content.
        out: the picture.
        section: identifier of what stands at the top.
    """

    def resize(to: int) -> None:
        screen = {"width": width, "height": to, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    resize(height or 100)
    browser.get(page.as_uri())
    if height is None:
        resize(int(browser.execute_script("return Math.ceil(document.body.firstChild.getBoundingClientRect().height)")))
    if section:
        browser.execute_script(
            "document.documentElement.style.scrollBehavior = 'auto';"
            f"scrollTo(0, document.getElementById('{section}').getBoundingClientRect().top + scrollY - 8)"
        )
    browser.save_screenshot(str(out))


if __name__ == "__main__":
    main()
