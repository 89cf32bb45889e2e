"""Scores written down as soon as they are known, so that no response is scored twice, whatever happens to the run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.rewards.answers import Score
from megarl.rollout.requests import Rollout
from megarl.rollout.stored import phase_file

Entry = tuple[Score | None, dict[str, float | None]]


class Journal:
    """A file per phase and stream in a folder, a line per scored response. Lives on the rank that asks for scores.

    A response is known by its prompt's record, its number and its tokens, and a score by the function that gave it:
    other weights, records, settings or functions find nothing.
    """

    def __init__(
        self, folder: Path, name: str, function: str = "", *, copy: Path | None = None, source: Path | None = None
    ) -> None:
        """
        Args:
            name: what was asked: each key of the configuration has its own files.
            function: `fingerprint` of what answers.
            copy: folder of a dump of rollouts, in which their scores are kept too.
            source: folder of such a dump, whose scores are known.
        """
        self.folder, self.name, self.function = folder, name, function
        self.folders = [folder] if copy is None else [folder, copy]
        self.sources = [folder] if source is None else [source, folder]

    def read(self, stream: int, phase: int) -> dict[str, Entry]:
        """Scores of a phase by `identity`; a last line that was cut off by the end of a process does not count."""
        found: dict[str, Entry] = {}
        for folder in self.sources:
            path = self._path(folder, stream, phase)
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record["by"] == self.function:
                    found[record["of"]] = (record["score"], record["parts"])
        return found

    def write(
        self,
        stream: int,
        phase: int,
        names: Sequence[str],
        scores: Sequence[Score | None],
        parts: dict[str, list[float | None]],
    ) -> None:
        """Add scores of responses by `identity`; they are on disk when this returns."""
        lines = []
        for row, (name, score) in enumerate(zip(names, scores, strict=True)):
            own = {part: column[row] for part, column in parts.items()}
            record = {"of": name, "score": score, "parts": own, "by": self.function}
            lines.append(json.dumps(record, allow_nan=False) + "\n")
        for folder in self.folders:
            _append(self._path(folder, stream, phase), lines)

    def forget(self, before: int) -> None:
        """Remove phases that no kept checkpoint leads to again; copies stay."""
        for path in self.folder.glob(f"{self.name}-*.jsonl"):
            if int(path.stem.rpartition("-")[2]) < before:
                path.unlink(missing_ok=True)

    def _path(self, folder: Path, stream: int, phase: int) -> Path:
        rollouts = phase_file(folder, stream, phase)
        return rollouts.with_name(f"{self.name}-{rollouts.name}")


def identity(rollout: Rollout, metadata: Mapping[str, Any] | None = None) -> str:
    """Names a response by its place, its tokens and the other fields of its prompt's record."""
    told = json.dumps([rollout.prompt, rollout.response, *filter(None, [metadata])], sort_keys=True, default=repr)
    return f"{rollout.prompt_id}-{rollout.sample_id}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _append(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.writelines(["\n", *lines] if torn else lines)
        file.flush()
        os.fsync(file.fileno())
