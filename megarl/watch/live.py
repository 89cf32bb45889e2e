"""The parts of a run's page, each with a version that changes when the part does, rendered when a browser asks."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from megarl.disk import shown
from megarl.report.curves import GROUPS, Compared, bands, figure
from megarl.report.data import RunData
from megarl.report.markup import as_script, number
from megarl.report.page import SECTIONS, head, labels, page, section_of
from megarl.report.shell import POLICY, WATCH, Surroundings
from megarl.report.write import findings_of
from megarl.watch.follow import RunFollower

_FOLDER = Path(__file__).resolve().parent
_STYLE, _SCRIPT = ((_FOLDER / name).read_text(encoding="utf-8").strip() for name in ("live.css", "live.js"))
POLICY_HERE = f"{POLICY}; connect-src 'self'"
"""What a browser lets the page do: a report's policy, and requests to the server that it came from."""
_HEADER = (
    '<p id="live" class="live">This page was made once: without its script it does not follow the run.</p>'
    '<p id="announced" class="unseen" role="status"></p>'
)


class LivePage:
    """The page of a run that is followed. Its methods may be called from several threads.

    A part is an element of the page with an identifier: the head, a section, or the figure of a metric. The section of
    curves is none, as it holds figures; it changes when one is added.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = threading.RLock()
        self._follower = RunFollower(folder)
        self._started = base64.urlsafe_b64encode(os.urandom(6)).decode()  # so that no version of another server counts
        self._keys: dict[str, Hashable] = {}
        self._versions: dict[str, int] = {}
        self._rendered: dict[str, tuple[int, str]] = {}
        self._fault = ""  # why the last change is not shown, as a sentence
        self.number = 0
        """Grows whenever anything changes."""
        self._update()
        self.refresh()

    @property
    def run(self) -> RunData:
        """The data of the run as last read."""
        return self._follower.data

    def refresh(self) -> bool:
        """Read what is new in the run folder. Return whether anything is.

        What fails is shown as a problem of the page, which then keeps what it had until the next change.
        """
        with self._lock:
            try:
                if not self._follower.poll():
                    return False
                self._update()
                self._fault = ""
            except Exception as raised:  # whatever a file has, the page goes on
                known, reason = self._fault, shown(f"{type(raised).__name__}: {raised}", 300)
                self._fault = f"megarl watch cannot show the last change of the run ({reason})."
                if self._fault == known:
                    return False
                self.number += 1
            return True

    def state(self) -> dict[str, Any]:
        """Return what browsers are told at every change: the version of each part, and what to say of the run."""
        with self._lock:
            return {
                "parts": {name: f"{self._started}.{version}" for name, version in self._versions.items()},
                "said": said(self.run),
                "problem": self._fault or self._follower.problem or "",
                "running": self.run.summary.get("status") in (None, "running"),
            }

    def parts(self, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return the version and HTML of those of some parts that there are; HTML is empty for an empty section."""
        with self._lock:
            wanted = [name for name in dict.fromkeys(names) if name in self._versions]
            return {name: (f"{self._started}.{self._versions[name]}", self._html(name)) for name in wanted}

    def page(self) -> str:
        """Return the whole page."""
        with self._lock:
            around = Surroundings(
                policy=POLICY_HERE,
                style=_STYLE,
                header=_HEADER,
                end=f"{as_script(self.state(), 'state')}<script>{_SCRIPT}</script>",
                footer="It follows the run while megarl watch runs.",
            )
            return page([self.run], self._compared.findings, around, WATCH)

    def _update(self) -> None:
        """Make new versions of the parts whose sources have changed."""
        run = self.run
        self._compared = Compared([run], labels([run]), [findings_of(run)])
        self._metrics = {identifier: name for name, identifier in self._compared.ids.items()}
        self.number += 1
        keys = self._sources()
        for name, key in keys.items():
            if name not in self._versions or self._keys[name] != key:
                self._versions[name] = self.number
        self._versions = {name: self._versions[name] for name in keys}
        self._rendered = {name: known for name, known in self._rendered.items() if name in keys}
        self._keys = keys

    def _sources(self) -> dict[str, Hashable]:
        """Return for each part what it is made of, as far as that can change."""
        run, stamps, metrics = self.run, self._follower.stamps, self._follower.metrics
        config, last = stamps.get("config.yaml"), run.rows[-1]["step"] if run.rows else None
        facts = tuple(stamps.get(name) for name in ("summary.json", "config.yaml", "versions.json", "git.json"))
        (findings,) = self._compared.findings or ((),)
        sources: dict[str, Hashable] = {
            "head": (facts, last),
            "findings": (tuple(findings), tuple(self._compared.ids)),
            "run": (facts, last),
            "predicted": (facts, stamps.get("plan.json"), metrics.readings),
            "values": metrics.readings if run.rows else None,
            "scores": (stamps.get("scores"), metrics.readings),
            "samples": (stamps.get("samples.jsonl"), run.unit),
            "tokens": (stamps.get("tokens.jsonl"),),
            "configuration": (config, run.entry),
        }
        for identifier, name in self._metrics.items():
            marked = tuple(bands(self._compared, name))
            sources[identifier] = (name, metrics.changed.get(name), marked, config, run.entry)
        return sources

    def _html(self, name: str) -> str:
        version, html = self._rendered.get(name, (0, ""))
        if version != self._versions[name]:
            version, html = self._versions[name], self._render(name)
            self._rendered[name] = (version, html)
        return html

    def _render(self, name: str) -> str:
        if name == "head":
            return head(self._compared)
        if name in SECTIONS:
            return section_of(self._compared, name)
        return figure(self._compared, self._metrics[name])


def said(run: RunData) -> str:
    """Return the last logged step and its main metric, as text."""
    if not run.rows:
        off = run.setting("logger.csv") is False
        return "This run logs no metrics.csv (logger.csv=false)." if off else "Nothing is logged yet."
    row = run.rows[-1]
    when = f"{run.unit} {number(int(row['step']))}"
    main = next((name for _, names in GROUPS for name in names if name in row), None)
    return when if main is None else f"{when}: {main} {number(row[main])}"
