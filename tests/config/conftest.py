"""What the configuration tests share: a folder of one's own to start in, and an entry point to run there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.config.compose import run

HEADER = "# @package _global_\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one, with no launcher's variables around."""
    for name in ("WORLD_SIZE", "RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def preset(folder: Path) -> Callable[..., None]:
    """Writes ./conf/NAME.yaml, marked as a preset unless told otherwise."""

    def write(name: str, text: str, header: str = HEADER) -> None:
        (folder / "conf").mkdir(exist_ok=True)
        (folder / "conf" / f"{name}.yaml").write_text(header + text, encoding="utf-8")

    return write


@pytest.fixture
def start(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the sft entry point in this process: (exit code, stdout, stderr)."""

    def call(*argv: str, main: Callable[[Any], int | None] = lambda config: 0) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            run("sft", list(argv), main)
        out, err = capsys.readouterr()
        return int(exit_info.value.code or 0), out, err

    return call
