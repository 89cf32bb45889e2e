"""Shows a few responses of every evaluation on the terminal, in the run folder and in loggers that take text; writes
what training computed for the tokens of some responses."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.table import Table

from megarl.callbacks.trainer_state import steps_taken, unit
from megarl.command import printable
from megarl.disk import nan_to_null
from megarl.logging import get_logger

logger = get_logger(__name__)
_WIDTH, _LONGEST = 110, 200  # characters of the table's width, and of a text in it


class Samples(Callback):
    """Shows `module.samples`, the rows (dicts) of the last evaluation, and appends them to `samples.jsonl`."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / "samples.jsonl"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the samples of the evaluation before training, if there was one."""
        self._show(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the samples of the evaluation."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows: list[dict[str, Any]] = getattr(pl_module, "samples", [])
        if not rows or not trainer.is_global_zero:
            return
        step = steps_taken(trainer)
        append(self.path, [{unit(trainer): step, **row} for row in rows])
        logger.info("%s %d  samples:\n%s", unit(trainer), step, as_table(rows))
        for entry in trainer.loggers:
            if isinstance(entry, TensorBoardLogger):
                entry.experiment.add_text("samples", _markdown(rows), step)
            elif isinstance(entry, WandbLogger):
                entry.log_table("samples", columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step)


class Traces(Callback):
    """Appends `module.traces`, records of the tokens of a few responses of a phase, to `tokens.jsonl`."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / "tokens.jsonl"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write the records of the phase that ended."""
        records: list[dict[str, Any]] = getattr(pl_module, "traces", [])
        if records and trainer.is_global_zero:
            append(self.path, [{unit(trainer): steps_taken(trainer), **record} for record in records])


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(nan_to_null(row), allow_nan=False) + "\n" for row in rows)


def as_table(rows: list[dict[str, Any]]) -> str:
    """Format rows with the same keys as a plain-text table."""
    table = Table(show_edge=False, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    console = Console(file=io.StringIO(), width=_WIDTH)
    console.print(table, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text).rstrip()


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = printable(str(value))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
