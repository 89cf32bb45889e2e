"""The folder of a sweep is its whole state: `sweep.json`, and a folder per trial with `trial.json` and the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.disk import UnreadableError, read_json, shown, writable, write_atomically
from megarl.errors import ConfigError
from megarl.trials.plan import Plan
from megarl.trials.search import Trial

_METRIC = ("sweep.metric", "sweep.mode", "sweep.value")


class SweepFolder:
    """The state of a sweep on disk. One process at a time works in it."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.path = plan, writable(str(plan.folder), "sweep.dir")
        self.records: list[dict[str, Any]] = []

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Own the folder within the block, with the trials that it has. Refuse a folder of another sweep."""
        import fcntl

        (self.path / "trials").mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"sweep.dir={self.path} belongs to a sweep that is running: wait for it, or use another sweep.dir",
                    key="sweep.dir",
                    value=str(self.path),
                ) from None
            self.records = [self._read(path) for path in sorted((self.path / "trials").glob("*/trial.json"))]
            for number, record in enumerate(self.records):
                if record["number"] != number:
                    lacks = self.trial_folder(number)
                    raise ConfigError(f"{lacks} is missing: restore it, or use another sweep.dir", where=lacks)
            self._claim()
            yield

    def _claim(self) -> None:
        """Write what the sweep is, or refuse the folder of another one. Before there are results, the metric may still
        change."""
        mine, path = self.plan.description(), self.path / "sweep.json"
        if self.records:
            theirs = _read_object(path)
            decided = any(one["results"] for one in self.records)
            for key, value in mine.items():
                if theirs.get(key) != value and (decided or key not in _METRIC):
                    raise ConfigError(
                        f"sweep.dir={self.path} has a sweep with {key}={shown(theirs.get(key))}, and this one has "
                        f"{shown(value)}: use the same settings to resume it, or another sweep.dir",
                        key=key,
                        value=value,
                        where=path,
                    )
        write_atomically(path, json.dumps(mine, indent=2) + "\n")

    def _read(self, path: Path) -> dict[str, Any]:
        found = _read_object(path)
        if {"number", "settings", "results", "running", "pid"} - found.keys():
            raise ConfigError(f"{path} is damaged: remove the folder {path.parent}", key="trial.json", where=path)
        return found

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.path / "trials" / f"{number:04d}"

    def trials(self) -> list[Trial]:
        """Return the trials so far, by number."""
        return [
            Trial(
                one["number"],
                dict(one["settings"]),
                {int(budget): result["value"] for budget, result in one["results"].items()},
                one["running"],
            )
            for one in self.records
        ]

    def write(self, number: int, **changes: Any) -> None:
        """Change the record of a trial, or add it."""
        if number == len(self.records):
            self.records.append({"number": number, "settings": {}, "results": {}, "running": None, "pid": None})
        self.records[number].update(changes)
        folder = self.trial_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "trial.json", json.dumps(self.records[number], indent=2) + "\n")

    def forget_last(self) -> None:
        """Remove the record of the last trial, which was refused before it began."""
        number = self.records.pop()["number"]
        (self.trial_folder(number) / "trial.json").unlink()

    def reopen_failed(self) -> None:
        """Let the trials that failed run again, with the budget that they failed with."""
        for record in self.records:
            for budget, result in list(record["results"].items()):
                if result["value"] is None:
                    kept = {name: one for name, one in record["results"].items() if name != budget}
                    self.write(record["number"], results=kept, running=int(budget))

    def finish(self, number: int, budget: int, value: float | None, **more: Any) -> None:
        """Write the result of a trial with a budget."""
        results = {**self.records[number]["results"], str(budget): {"value": value, **more}}
        self.write(number, results=results, running=None, pid=None)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except UnreadableError as problem:
        raise ConfigError(
            f"{path} {problem}: restore it, or use another sweep.dir", key="sweep.dir", where=path
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object: restore it", key="sweep.dir", where=path)
    return found
