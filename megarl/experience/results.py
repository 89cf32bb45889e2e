"""The results of an evaluation on disk, chunk by chunk, so that an interrupted one continues where it was.

A chunk is some neighbouring prompts with all their responses. Its responses are in a file of `rollout/stored.py`, its
scores in a JSON file beside it. Each is written all or nothing. Only rank 0 uses this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.disk import UnreadableError, is_file, parse_json, read_text, write_atomically
from megarl.errors import ConfigError, DataError
from megarl.rewards.scores import Scores
from megarl.rollout import stored
from megarl.rollout.requests import Rollout

FOLDER, SETTINGS = "results", "settings.json"
_REMEDY = "remove the file to compute it again"


@dataclass(frozen=True)
class ChunkName:
    """A chunk of one setting of a sweep: the random stream of the setting, and the chunk's index."""

    stream: int
    index: int


class Results:
    """The responses and scores of an evaluation in a folder."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        """Refuse a folder with the results of an evaluation with other settings.

        Args:
            run_dir: folder of the run.
            settings: what responses depend on, by configuration key, as values of JSON.
        """
        self.folder = run_dir / FOLDER
        path = self.folder / SETTINGS
        given = json.loads(json.dumps(settings))
        if is_file(path):
            self._compare(path, given, run_dir)
            return
        self._write(path, [_as_line(given)])

    def rollouts(self, name: ChunkName) -> list[Rollout] | None:
        """Return the responses of a chunk; None if they are not there yet."""
        path = stored.phase_file(self.folder, name.stream, name.index)
        return stored.load(path, _REMEDY) if is_file(path) else None

    def keep_rollouts(self, name: ChunkName, rollouts: Sequence[Rollout]) -> None:
        """Write the responses of a chunk."""
        self._write(stored.phase_file(self.folder, name.stream, name.index), stored.as_lines(rollouts))

    def scores(self, name: ChunkName, scorer: str, fingerprint: str, count: int) -> Scores | None:
        """Return the scores of a chunk's `count` responses by a scorer; None if that scorer, with this fingerprint, has
        not scored them yet."""
        path = self._scores_file(name, scorer)
        if not is_file(path):
            return None
        record = _read(path)
        values: Any = record.get("values") if isinstance(record, dict) else None
        parts: Any = record.get("parts") if isinstance(record, dict) else None
        columns = [values, *parts.values()] if isinstance(parts, dict) else [None]
        if not all(isinstance(column, list) and len(column) == count for column in columns):
            raise DataError(f"{path} has no scores of {count} responses: {_REMEDY}", where=path)
        return Scores(values=values, parts=parts) if record.get("by") == fingerprint else None

    def keep_scores(self, name: ChunkName, scorer: str, fingerprint: str, scores: Scores) -> None:
        """Write the scores of a chunk's responses."""
        record = {"by": fingerprint, "values": scores.values, "parts": scores.parts}
        self._write(self._scores_file(name, scorer), [_as_line(record)])

    def _scores_file(self, name: ChunkName, scorer: str) -> Path:
        rollouts = stored.phase_file(self.folder, name.stream, name.index)
        return rollouts.with_name(f"{scorer}-{rollouts.stem}.json")

    def _write(self, path: Path, lines: Sequence[str]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lines)
        except OSError as problem:
            raise DataError(
                f"{path} cannot be written ({problem.strerror}): free space, or set run.dir to another folder",
                key="run.dir",
                where=path,
            ) from None

    def _compare(self, path: Path, given: Mapping[str, Any], run_dir: Path) -> None:
        """Refuse settings that differ from those in the file."""
        kept = _read(path)
        if kept == given:
            return
        kept = kept if isinstance(kept, dict) else {}
        keys = [key for key in {**kept, **given} if kept.get(key) != given.get(key)]
        raise ConfigError(
            f"run.dir={run_dir} has the results of an evaluation with another {', '.join(keys)}: name another folder, "
            "or repeat the settings of that evaluation",
            key="run.dir",
            value=str(run_dir),
            where=path,
        )


def _read(path: Path) -> Any:
    try:
        return parse_json(read_text(path))
    except UnreadableError as problem:
        raise DataError(f"{path} {problem}: {_REMEDY}", where=path) from None


def _as_line(record: object) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
