"""Where metrics go besides the console."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf, optional_section


@dataclass
class WandbConfig(Section):
    """How metrics are sent to Weights & Biases."""

    project: str = leaf("megarl", "Project of Weights & Biases that the run belongs to.")
    mode: str = leaf("online", "Send metrics during the run, or keep them for wandb sync.", ("online", "offline"))


@dataclass
class MlflowConfig(Section):
    """How metrics are sent to MLflow."""

    uri: str | None = leaf(None, "Address of an MLflow tracking server, or a folder (null: mlruns in the run folder).")


@dataclass
class LoggerConfig(Section):
    """Where metrics go besides the console."""

    tensorboard: bool = leaf(True, "Write TensorBoard event files to the run folder.")
    csv: bool = leaf(True, "Write metrics.csv to the run folder.")
    wandb: WandbConfig | None = optional_section(WandbConfig, "Log metrics to Weights & Biases.")
    mlflow: MlflowConfig | None = optional_section(MlflowConfig, "Log metrics to MLflow.")
