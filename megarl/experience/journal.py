"""Scores that are written to disk as soon as they are known, so that no response is scored twice after a restart."""

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
    """One file per phase and stream in a folder, with one line per scored response. It lives on the rank that calls the
    scorer.

    A response is identified by its prompt's record, its sample id and its tokens, and a score by the function that
    returned it. Other weights, records, settings or functions therefore find no score.
    """

    def __init__(
        self, folder: Path, name: str, function: str = "", *, copy: Path | None = None, source: Path | None = None
    ) -> None:
        """
        Args:
            folder: folder of the journal.
            name: prefix of the files; each scored configuration key has its own.
            function: `fingerprint` of the scoring function.
            copy: folder of a dump of rollouts, into which scores are written too.
            source: folder of such a dump, from which scores are read too.
        """
        self.folder, self.name, self.function = folder, name, function
        self.folders = [folder] if copy is None else [folder, copy]
        self.sources = [folder] if source is None else [source, folder]

    def read(self, stream: int, phase: int) -> dict[str, Entry]:
        """Return the stored scores of a phase by `identity`. Invalid lines, such as a truncated one, are skipped."""
        entries: dict[str, Entry] = {}
        for folder in self.sources:
            path = self._path(folder, stream, phase)
            invalid = []
            for number, line in enumerate(_lines(path), 1):
                record = _entry(line)
                if record is None:
                    invalid.append(number)
                elif record["by"] == self.function:
                    entries[record["of"]] = (record["score"], record["parts"])
            if invalid:
                log.warning(
                    "%s: line %d is not a valid score (%d such lines) and is skipped", path, invalid[0], len(invalid)
                )
        return entries

    def write(
        self,
        stream: int,
        phase: int,
        names: Sequence[str],
        scores: Sequence[Score | None],
        parts: dict[str, list[float | None]],
    ) -> None:
        """Append scores of responses, which `names` identifies (see `identity`). They are on disk when this returns."""
        lines = []
        for row, (name, score) in enumerate(zip(names, scores, strict=True)):
            own = {part: column[row] for part, column in parts.items()}
            record = {"of": name, "score": score, "parts": own, "by": self.function}
            lines.append(json.dumps(record, allow_nan=False) + "\n")
        for folder in self.folders:
            _append(self._path(folder, stream, phase), lines)

    def forget(self, before: int) -> None:
        """Delete the phases before this one, to which no checkpoint leads back. Copies in a dump stay."""
        for path in self.folder.glob(f"{self.name}-*.jsonl"):
            phase = phase_of(path.name.removeprefix(f"{self.name}-"))
            if phase is not None and phase < before:
                path.unlink(missing_ok=True)

    def _path(self, folder: Path, stream: int, phase: int) -> Path:
        rollouts = phase_file(folder, stream, phase)
        return rollouts.with_name(f"{self.name}-{rollouts.name}")


def identity(rollout: Rollout, metadata: Mapping[str, Any] | None = None) -> str:
    """Return an identifier of a response: its ids, and a hash of its tokens and its record's other fields."""
    content = json.dumps([rollout.prompt, rollout.response, *filter(None, [metadata])], sort_keys=True, default=repr)
    return f"{rollout.prompt_id}-{rollout.sample_id}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _lines(path: Path) -> list[bytes]:
    if not is_file(path):
        return []
    try:
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except OSError as problem:
        raise DataError(
            f"the scores in {path} cannot be read ({problem.strerror}): give this user read permission, or "
            "remove the file to compute the scores again",
            where=path,
        ) from None


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the record that `write` wrote in this line; None if the line is anything else."""
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
            f"scores cannot be written to {path} ({problem.strerror}): free space or fix the folder, then start again",
            where=path,
        ) from None
