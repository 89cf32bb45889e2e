"""Opens pages in a browser that a test drives, on a screen of any width and in both themes."""

from __future__ import annotations

from typing import Any

THEMES = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
"""The background of a page by theme."""


def show(browser: Any, address: str, width: int, theme: str = "light") -> None:
    """Open the page on a screen of this width in a theme."""
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(address)


def serious_findings(browser: Any, axe: str) -> list[tuple[str, str]]:
    """What axe finds on the open page that keeps somebody from using it: rule and HTML of the first place."""
    checked = browser.execute_async_script(f"{axe}; const done = arguments[0]; axe.run(document).then(done)")
    assert len(checked["passes"]) > 15
    serious = [each for each in checked["violations"] if each["impact"] in ("serious", "critical")]
    return [(each["id"], each["nodes"][0]["html"]) for each in serious]
