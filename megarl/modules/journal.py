"""Scores written down as soon as they are known, so that no response is scored twice, whatever happens to the run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megarl.rewards.answers import Score
from megarl.rollout.requests import Rollout

_STREAMS = ("train", "eval")
Entry = tuple[Score | None, dict[str, float | None]]


class Journal:
    """A file per phase and stream in a folder, a line per scored response. Lives on the rank that asks for scores.

    A response is known by its prompt, its number and its tokens, so that other weights or settings find nothing.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """`name` is what was asked: each function has its own files."""
        self.folder, self.name = folder, name

    def read(self, stream: int, phase: int) -> dict[str, Entry]:
        """Scores of a phase by `identity`; a last line that was cut off by the end of a process does not count."""
        path = self._path(stream, phase)
        found: dict[str, Entry] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                found[record["of"]] = (record["score"], record["parts"])
        return found

    def write(
        self,
        stream: int,
        phase: int,
        rollouts: Sequence[Rollout],
        scores: Sequence[Score | None],
        parts: dict[str, list[float | None]],
    ) -> None:
        """Add scores; they are on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(stream, phase)
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            if torn:
                file.write("\n")
            for row, (rollout, score) in enumerate(zip(rollouts, scores, strict=True)):
                own = {name: column[row] for name, column in parts.items()}
                file.write(json.dumps({"of": identity(rollout), "score": score, "parts": own}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget(self, before: int) -> None:
        """Remove phases that no kept checkpoint leads to again."""
        for path in self.folder.glob(f"{self.name}-*.jsonl"):
            if int(path.stem.rpartition("-")[2]) < before:
                path.unlink(missing_ok=True)

    def _path(self, stream: int, phase: int) -> Path:
        return self.folder / f"{self.name}-{_STREAMS[stream]}-{phase:06d}.jsonl"


def identity(rollout: Rollout) -> str:
    """Names a response by its place and its tokens."""
    tokens = json.dumps([rollout.prompt, rollout.response]).encode()
    return f"{rollout.prompt_id}-{rollout.sample_id}-{hashlib.sha256(tokens).hexdigest()[:16]}"
