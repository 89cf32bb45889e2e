"""Files that ship inside the package, and how YAML names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DEMO_TRAIN = "data/demo/train.jsonl"
DEMO_EVAL = "data/demo/eval.jsonl"
_PACKAGE = Path(__file__).resolve().parents[1]


def conf_folder() -> Path:
    """The shipped configuration: inside the package when installed, beside it in a checkout."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parent / "conf"


def resource(path: str) -> str:
    """Absolute path of a file that ships inside the package; behind `${resource:...}` in YAML."""
    return str(_PACKAGE / path)


def shown_resource(value: str) -> str:
    """A path of a file that ships inside the package as YAML has it, whatever folder megarl is in."""
    path = Path(value)
    if not path.is_relative_to(_PACKAGE):
        return value
    return f"${{resource:{path.relative_to(_PACKAGE).as_posix()}}}"


def demo_eval(train: Sequence[str]) -> list[str]:
    """The demo's evaluation set where the demo is trained on; behind `${demo_eval:...}` in YAML."""
    return [resource(DEMO_EVAL)] if resource(DEMO_TRAIN) in train else []
