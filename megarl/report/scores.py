"""The scores of single responses, by phase: read from a run's journal, or from the copy in its dump of rollouts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from megarl.disk import UnreadableError, is_dir, local, parse_object, read_text
from megarl.report.data import RunData

MOST_PHASES = 60
"""Maximum number of phases that a report shows; of more, as many evenly spaced ones."""
_FILE = re.compile(r"reward-train-(\d{6,18})(?:-from-\d{6,18})?\.jsonl")
PhaseScores = tuple[int, Sequence[float]]


def read_scores(run: RunData) -> list[PhaseScores]:
    """Return phases with the scores of their responses; empty where the run keeps none.

    A journal has the phases since the oldest checkpoint, and a dump (`rollout.dump`) has all of them. Lines that
    are no score, such as one that is being written, are skipped.
    """
    files = next((found for folder in score_folders(run) if (found := _files(folder))), {})
    phases = sorted(files)
    if len(phases) > MOST_PHASES:
        phases = [phases[index * (len(phases) - 1) // (MOST_PHASES - 1)] for index in range(MOST_PHASES)]
    scores = [(phase, [score for path in files[phase] for score in _read(path)]) for phase in phases]
    return [(phase, found) for phase, found in scores if found]


def score_folders(run: RunData) -> list[Path]:
    """Return the folders that may have the scores; the first that has any is read."""
    dump = run.setting("rollout.dump")
    return [*([local(dump)] if isinstance(dump, str) else []), run.path / "journal"]


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which a share of sorted values lies, interpolated between neighbours."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _files(folder: Path) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    if not is_dir(folder):
        return found
    try:
        for path in sorted(folder.iterdir()):
            if match := _FILE.fullmatch(path.name):
                found.setdefault(int(match[1]), []).append(path)
    except OSError:
        return {}
    return found


def _read(path: Path) -> list[float]:
    try:
        lines = read_text(path).splitlines()
    except UnreadableError:
        return []
    found: dict[str, float] = {}
    for line in lines:
        try:
            record = parse_object(line)
        except UnreadableError:
            continue
        score = _total(record.get("score"))
        if score is not None:
            found[str(record.get("of"))] = score  # a response that was scored again replaces its first score
    return list(found.values())


def _total(score: object) -> float | None:
    """Return the score of a response: of rewards per token, their sum."""
    parts = score if isinstance(score, list) and score else [score]
    values = [part for part in parts if isinstance(part, int | float) and not isinstance(part, bool)]
    try:
        total = float(sum(values))
    except OverflowError:
        return None
    return total if len(values) == len(parts) and math.isfinite(total) else None
