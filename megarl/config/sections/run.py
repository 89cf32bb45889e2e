"""The files that a run writes: its folder, checkpoints and an exported model."""

# ruff: noqa: RUF009 - `leaf` and `optional_section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from megarl.config.forms import folder_name, metric_name, resume_choice
from megarl.config.leaf import Section, leaf, optional_section, or_defaults


@dataclass
class FolderConfig(Section):
    """The folder of an evaluation, which continues in it when it is started again."""

    dir: str | None = leaf(
        None,
        "Folder for the log, and for responses and scores as soon as they are known (null: runs/NAME). Started again "
        "with the same folder, an interrupted evaluation continues. A multirun appends the job's number.",
    )
    name: str | None = leaf(None, "Name of the folder below runs (null: evaluate and a timestamp).", form=folder_name)


@dataclass
class RunConfig(Section):
    """Settings of the run folder and of resuming."""

    dir: str | None = leaf(
        None, "Folder of this run, for logs and checkpoints (null: runs/NAME). A multirun appends the job's number."
    )
    name: str | None = leaf(
        None, "Name of this run (null: the name of the entry point and a timestamp).", form=folder_name
    )
    resume: str = leaf(
        "auto",
        "Where the run starts from. auto: the newest checkpoint in the run folder, if there is one; never: the "
        "beginning; or the path of a checkpoint.",
        form=resume_choice,
    )


def _metric(default: str) -> Any:
    return leaf(
        default, "Logged metric that decides which checkpoint is the best, as in docs/metrics.md.", form=metric_name
    )


def _mode(default: str) -> Any:
    return leaf(default, "Whether the smallest or the largest value of the metric is the best.", ("min", "max"))


@dataclass
class BestCheckpointsConfig(Section):
    """Which checkpoints are the best: those with the smallest loss, unless set otherwise."""

    metric: str = _metric("eval/loss")
    mode: str = _mode("min")
    keep: int = leaf(
        1,
        "Number of best checkpoints, by checkpoint.best.metric, that are kept as well. An evaluation among the best "
        "writes a checkpoint even between those of checkpoint.every.",
        at_least=0,
    )


@dataclass
class BestByScoreConfig(BestCheckpointsConfig):
    """Which checkpoints are the best, for algorithms whose evaluations score responses."""

    metric: str = _metric("eval/score")
    mode: str = _mode("max")


@dataclass
class BestByAccuracyConfig(BestCheckpointsConfig):
    """Which checkpoints are the best, for algorithms that learn preferences."""

    metric: str = _metric("eval/accuracy")
    mode: str = _mode("max")


def _best(kind: type) -> Any:
    return optional_section(
        kind,
        "Which checkpoints are the best, and how many of them are kept; null means the defaults.",
        null_is_defaults=True,
    )


@dataclass
class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int | None = leaf(
        50,
        "Training steps between checkpoints; in PPO, GRPO and RFT a training step is a phase (null: only those of "
        "checkpoint.best.keep and checkpoint.save_last).",
        at_least=1,
    )
    keep_last: int = leaf(2, "Number of newest checkpoints that are kept.", at_least=1)
    async_save: bool = leaf(False, "Write checkpoints in the background while training continues.")
    save_last: bool = leaf(True, "Write a checkpoint when training ends.")
    best: BestCheckpointsConfig | None = _best(BestCheckpointsConfig)

    @property
    def best_settings(self) -> BestCheckpointsConfig:
        """The settings of the best checkpoints, at their defaults where they are null."""
        return cast("BestCheckpointsConfig", or_defaults(self, "best"))


@dataclass
class ScoreCheckpointConfig(CheckpointConfig):
    """When checkpoints are written and which are kept, for algorithms whose evaluations score responses."""

    best: BestByScoreConfig | None = _best(BestByScoreConfig)


@dataclass
class AccuracyCheckpointConfig(CheckpointConfig):
    """When checkpoints are written and which are kept, for algorithms that learn preferences."""

    best: BestByAccuracyConfig | None = _best(BestByAccuracyConfig)


EXPORT = "Files for other programs, written when training ends (null: none)."


@dataclass
class ExportConfig(Section):
    """Settings of the files for other programs that are written when training ends."""

    hf: str | None = leaf(
        None,
        "Folder, which must not exist yet, for the trained model in the format of Hugging Face transformers (null: no"
        " export). A run that stops early does not write it; its resume does. Adapters are merged into the weights.",
    )
    peft: str | None = leaf(
        None,
        "Folder, which must not exist yet, for the trained adapter in the format of PEFT (null: no export). Needs "
        "adapter.*.",
    )

    @property
    def folders(self) -> dict[str, str]:
        """The folders to export to, by key."""
        named = {"export.hf": self.hf, "export.peft": self.peft}
        return {key: folder for key, folder in named.items() if folder is not None}
