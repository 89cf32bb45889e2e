"""The files that a run writes: its folder, checkpoints and an exported model."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.forms import folder_name, metric_name, resume_choice
from megarl.config.leaf import Section, leaf


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


@dataclass
class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int | None = leaf(
        50,
        "Training steps between checkpoints; in PPO, GRPO and RFT a training step is a phase (null: only those of "
        "checkpoint.keep_best and checkpoint.save_last).",
        at_least=1,
    )
    keep_last: int = leaf(2, "Number of newest checkpoints that are kept.", at_least=1)
    keep_best: int = leaf(
        1,
        "Number of best checkpoints, by checkpoint.metric, that are kept as well. An evaluation among the best writes"
        " a checkpoint even between those of checkpoint.every.",
        at_least=0,
    )
    metric: str = leaf(
        "eval/loss", "Logged metric that decides which checkpoint is the best, as in docs/metrics.md.", form=metric_name
    )
    mode: str = leaf("min", "Whether the smallest or the largest value of the metric is the best.", ("min", "max"))
    async_save: bool = leaf(False, "Write checkpoints in the background while training continues.")
    save_last: bool = leaf(True, "Write a checkpoint when training ends.")


@dataclass
class ExportConfig(Section):
    """Settings of the files for other programs that are written when training ends."""

    hf: str | None = leaf(
        None,
        "Folder, which must not exist yet, for the trained model in the format of Hugging Face transformers (null: no"
        " export). A run that stops early does not write it; its resume does.",
    )
