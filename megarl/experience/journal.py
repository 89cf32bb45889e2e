"""Scores written down as soon as they are known, so that no response is scored twice, whatever happens to the run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.disk import UnreadableError, is_file, parse_object
from megarl.errors import DataError
from megarl.logging import get_logger
from megarl.rewards.answers import Score, is_number
from megarl.rollout.requests import Rollout
from megarl.rollout.stored import phase_file, phase_of

log = get_logger(__name__)
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
        """Scores of a phase by `identity`. Lines that are no entries, such as one that was cut off, do not count."""
        found: dict[str, Entry] = {}
        for folder in self.sources:
            path = self._path(folder, stream, phase)
            odd = []
            for number, line in enumerate(_lines(path), 1):
                record = _entry(line)
                if record is None:
                    odd.append(number)
                elif record["by"] == self.function:
                    found[record["of"]] = (record["score"], record["parts"])
            if odd:
                log.warning("%s: line %d is no score (%d such lines) and is passed over", path, odd[0], len(odd))
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
            phase = phase_of(path.name.removeprefix(f"{self.name}-"))
            if phase is not None and phase < before:
                path.unlink(missing_ok=True)

    def _path(self, folder: Path, stream: int, phase: int) -> Path:
        rollouts = phase_file(folder, stream, phase)
        return rollouts.with_name(f"{self.name}-{rollouts.name}")


def identity(rollout: Rollout, metadata: Mapping[str, Any] | None = None) -> str:
    """Names a response by its place, its tokens and the other fields of its prompt's record."""
    told = json.dumps([rollout.prompt, rollout.response, *filter(None, [metadata])], sort_keys=True, default=repr)
    return f"{rollout.prompt_id}-{rollout.sample_id}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _lines(path: Path) -> list[bytes]:
    if not is_file(path):
        return []
    try:
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except OSError as problem:
        raise DataError(
            f"the scores in {path} cannot be read ({problem.strerror}): give this user the right to read them, or "
            "remove the file and they are asked for again",
            where=path,
        ) from None


def _entry(line: bytes) -> dict[str, Any] | None:
    """What `write` wrote, or None for anything else."""
    try:
        record = parse_object(line)
    except UnreadableError:
        return None
    texts = (record.get("of"), record.get("by"))
    score, parts = record.get("score"), record.get("parts")
    numbers = score if isinstance(score, list) and score else [score]
    whole = (
        {"of", "by", "score", "parts"} <= record.keys()
        and all(isinstance(text, str) for text in texts)
        and isinstance(parts, dict)
        and (score is None or all(map(is_number, numbers)))
        and all(value is None or is_number(value) for value in parts.values())
    )
    return record if whole else None


def _append(path: Path, lines: Sequence[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.writelines(["\n", *lines] if torn else lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        raise DataError(
            f"scores cannot be kept in {path} ({problem.strerror}): free space or mend the folder, then start again",
            where=path,
        ) from None
