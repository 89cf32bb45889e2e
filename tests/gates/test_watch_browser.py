"""The page of `megarl watch` in a browser: it follows a run, and what its reader does stays."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from megarl.run.csv_logger import MetricsFile
from tests.gates.browsing import THEMES, serious_findings, show
from tests.report.made_up import NAMES, SUMMARY, made_up, write_run

pytestmark = pytest.mark.gate
PHASES = 300
SCORE = "metric-rollout-score"


class Run:
    """A run that logs when it is told to, and the address at which it is watched."""

    def __init__(self, folder: Path) -> None:
        summary = {**SUMMARY, "status": "running", "steps": PHASES, "max_steps": 1000}
        self.folder = write_run(folder, made_up(PHASES, summary=summary))
        self.phase = PHASES
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start `megarl watch`, on the same port as before."""
        command = [sys.executable, "-m", "megarl", "watch", str(self.folder), f"port={self.port}"]
        self.watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.watcher.stdout is not None
        self.address = self.watcher.stdout.readline().split()[0]
        self.port = urlsplit(self.address).port or 0

    def stop(self) -> None:
        """End `megarl watch`."""
        self.watcher.terminate()
        self.watcher.wait(10)

    def log(self, **more: float) -> str:
        """Log a phase. Return what the page shows of it."""
        self.phase += 1
        values = {name: math.sin(self.phase / 9 + index) for index, name in enumerate(NAMES)}
        values["rollout/score"] = self.phase / 4096
        MetricsFile(self.folder / "metrics.csv").log_metrics({**values, **more}, self.phase)
        return f"phase {self.phase}"


@pytest.fixture
def run(browser: Any, tmp_path: Path) -> Iterator[Run]:
    found = Run(tmp_path / "run")
    browser.get("about:blank")
    browser.get_log("browser")  # drop what earlier pages said
    yield found
    browser.get("about:blank")  # before the server is gone
    found.stop()


def wait_for(browser: Any, true: Callable[[], bool]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20, 0.05).until(lambda _: true())


def text(browser: Any, selector: str) -> str:
    found = browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
    return str(found)


def see(browser: Any, run: Run) -> None:
    """Scroll to the curve of the score and wait until it has the last phase."""
    wait_for(browser, lambda: bool(text(browser, f"#{SCORE}")))
    browser.execute_script("document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant'})", SCORE)
    wait_for(browser, lambda: text(browser, f"#{SCORE} .last").endswith(f"phase {run.phase}"))


def last_point(browser: Any) -> list[float]:
    points = json.loads(text(browser, f"#{SCORE} script"))["lines"][0]["points"]
    return list(points[-1])


def test_a_new_phase_appears_and_what_the_reader_does_stays(browser: Any, run: Run) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, run.address, 1280)
    see(browser, run)
    browser.find_element(By.ID, "smoothing").send_keys(Keys.END)
    browser.execute_script("document.querySelector(arguments[0]).open = true", f"#{SCORE} details")
    reader = browser.find_element(By.CSS_SELECTOR, f"#{SCORE} .reader")
    reader.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    readout = text(browser, f"#{SCORE} .readout")
    assert readout.startswith("phase 3: ")
    scrolled = browser.execute_script("return scrollY")
    elements = browser.execute_script("return [...document.querySelectorAll('figure.curve')]")
    for _ in range(3):
        said = run.log()
        wait_for(browser, lambda: text(browser, f"#{SCORE} .last").endswith(said))  # noqa: B023
    assert last_point(browser) == pytest.approx([run.phase, run.phase / 4096], rel=1e-5)
    assert f"Last: {said}: eval/score" in text(browser, "#live")
    wait_for(browser, lambda: text(browser, "#announced").startswith(said))
    assert text(browser, f"#{SCORE} .readout") == readout
    assert browser.switch_to.active_element == reader
    assert browser.execute_script("return document.querySelector(arguments[0]).open", f"#{SCORE} details")
    assert browser.execute_script("return scrollY") == scrolled
    assert browser.execute_script("return [...document.querySelectorAll('figure.curve')]") == elements
    assert text(browser, "output[for=smoothing]") == "0.95"
    assert browser.execute_script("return document.querySelectorAll(`#${arguments[0]} .smoothed`).length", SCORE) == 1
    reader.send_keys(Keys.END)
    assert text(browser, f"#{SCORE} .readout").startswith(f"{said}: ")
    assert browser.get_log("browser") == []


def test_what_was_out_of_sight_is_brought_up_to_date_when_it_is_seen(browser: Any, run: Run) -> None:
    show(browser, run.address, 1280)
    browser.execute_script("scrollTo({top: 0, behavior: 'instant'})")
    said = run.log()
    wait_for(browser, lambda: said in text(browser, "#live"))
    assert "phase" in text(browser, "#metric-eval-pass-4 .last")
    browser.execute_script("document.getElementById('metrics-eval').open = true")
    browser.execute_script("document.getElementById('metric-eval-pass-4').scrollIntoView({behavior: 'instant'})")
    wait_for(browser, lambda: text(browser, "#metric-eval-pass-4 .last").endswith(said))


def test_a_new_metric_and_a_new_section_are_put_where_a_report_has_them(browser: Any, run: Run) -> None:
    (run.folder / "samples.jsonl").unlink()
    run.stop()
    run.start()
    show(browser, run.address, 1280)
    assert not text(browser, "#samples")
    browser.execute_script("document.getElementById('metrics-eval').open = true")
    (run.folder / "samples.jsonl").write_text('{"phase": 1, "prompt": "What?", "response": "<b>This</b>"}\n')
    run.log(**{"eval/mine": 0.5, "own/metric": 2.0})
    wait_for(browser, lambda: "<b>This</b>" in text(browser, "#samples"))
    assert "own/metric" in text(browser, "#metrics-own")
    assert browser.execute_script("return document.getElementById('metrics-eval').open")
    assert browser.execute_script("return !document.getElementById('metrics-own').open")
    assert text(browser, "nav").count("Samples") == 1
    assert browser.get_log("browser") == []


def test_a_run_is_followed_from_before_its_first_row_until_its_end(browser: Any, run: Run) -> None:
    metrics = run.folder / "metrics.csv"
    run.stop()
    metrics.unlink()
    run.start()
    show(browser, run.address, 360)
    wait_for(browser, lambda: "Nothing is logged yet" in text(browser, "#live"))
    said = run.log()
    see(browser, run)
    assert said in text(browser, "#live")
    assert browser.execute_script("return !document.querySelector('.control').hidden")
    (run.folder / "summary.json").write_text(json.dumps({**SUMMARY, "status": "finished"}))
    wait_for(browser, lambda: "has ended" in text(browser, "#live"))
    assert browser.get_log("browser") == []


def test_a_lost_connection_is_said_and_taken_up_again(browser: Any, run: Run) -> None:
    show(browser, run.address, 1280)
    see(browser, run)
    run.stop()
    wait_for(browser, lambda: "No connection" in text(browser, "#live"))
    wait_for(browser, lambda: "No connection" in text(browser, "#announced"))
    run.log()
    run.start()  # with another token, so that the page's cookie is refused until the new address is opened
    wait_for(browser, lambda: "open the address that it printed" in text(browser, "#live"))
    page = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(run.address)
    assert "token" not in browser.current_url
    browser.close()
    browser.switch_to.window(page)
    see(browser, run)
    assert "Last: " in text(browser, "#live")
    assert "address" not in text(browser, "#live")


@pytest.mark.parametrize("link", ["file", "http://localhost"])
def test_a_link_of_another_site_opens_the_page(browser: Any, run: Run, tmp_path: Path, link: str) -> None:
    """Browsers do not send a strict cookie where another site has led to, by way of a redirect either."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    body = f'<a href="{run.address}">run</a>'.encode()

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    (tmp_path / "link.html").write_bytes(body)
    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        elsewhere = f"{link}:{other.server_address[1]}/"
        browser.get((tmp_path / "link.html").as_uri() if link == "file" else elsewhere)
        browser.find_element("css selector", "a").click()
        wait_for(browser, lambda: "Last: phase" in text(browser, "#live"))
        assert browser.current_url == f"http://127.0.0.1:{run.port}/"
        other.shutdown()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_the_screen_and_axe_finds_nothing_serious(
    browser: Any, axe: str, run: Run, width: int, theme: str
) -> None:
    show(browser, run.address, width, theme)
    run.log()
    see(browser, run)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == THEMES[theme]
    assert browser.get_log("browser") == []
    assert serious_findings(browser, axe) == []
