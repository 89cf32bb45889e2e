"""Files that ship inside the package, and their names in YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarl.logging import get_logger, warn_once

DEMO_TRAIN, DEMO_EVAL = "megarl.tasks.demo:train", "megarl.tasks.demo:held_out"
"""Functions that return the demo's records."""
_MOVED = {
    "data/demo/train.jsonl": DEMO_TRAIN,
    "data/demo/eval.jsonl": DEMO_EVAL,
    "data/demo/feelings-train.jsonl": "megarl.tasks.sentiment:train",
    "data/demo/feelings-eval.jsonl": "megarl.tasks.sentiment:held_out",
}
"""Files of earlier versions, and the functions that return their records."""
_PACKAGE = Path(__file__).resolve().parents[1]


def conf_folder() -> Path:
    """Return the folder of the shipped configuration: inside the package if installed, beside it in a checkout."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parent / "conf"


def launchers_folder() -> Path:
    """Return the folder of the shipped SLURM launchers: inside the package if installed, beside it in a checkout."""
    return conf_folder().parent / "launchers"


def metrics_page() -> Path:
    """Return docs/metrics.md, which defines every metric: inside the package if installed, in docs/ in a checkout."""
    installed = _PACKAGE / "report" / "metrics.md"
    return installed if installed.is_file() else _PACKAGE.parent / "docs" / "metrics.md"


def resource(path: str) -> str:
    """Return the absolute path of a file inside the package. It is the resolver `${resource:...}` of YAML."""
    if path in _MOVED:
        warn_once(get_logger(__name__), f"${{resource:{path}}} has moved: write {_MOVED[path]}, see docs/migrate.md")
        return _MOVED[path]
    return str(_PACKAGE / path)


def shown_resource(value: str) -> str:
    """Return the path of a file that ships inside the package in YAML's form; other values are unchanged."""
    path = Path(value)
    if not path.is_relative_to(_PACKAGE):
        return value
    return f"${{resource:{path.relative_to(_PACKAGE).as_posix()}}}"


def demo_eval(train: Sequence[str]) -> list[str]:
    """Return the demo's evaluation set if the demo is trained on. It is the resolver `${demo_eval:...}` of YAML."""
    return [DEMO_EVAL] if DEMO_TRAIN in train else []
