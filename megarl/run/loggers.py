"""Lightning loggers of a run's metrics, from the section `logger` of the configuration."""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from megarl.config.sections.logger import LoggerConfig, MlflowConfig, WandbConfig
from megarl.disk import UnreadableError, read_text, write_atomically
from megarl.errors import ConfigError, UnavailableError, one_line
from megarl.logging import get_logger, warn_once
from megarl.run.csv_logger import MetricsFile

logger = get_logger(__name__)

_INSTALL = "pip install 'megarl[log]'"
_EXPERIMENT = "megarl"  # MLflow's experiment: a collection of runs


def build_loggers(
    config: LoggerConfig, run_dir: str | os.PathLike[str], run_name: str, resolved_config: Mapping[str, Any]
) -> list[Logger]:
    """Return the configured loggers, each with the resolved configuration logged. A resumed run continues its entries.

    Args:
        config: which loggers to use, and where they report to.
        run_dir: folder of the run; everything local is written there.
        run_name: name shown by W&B and MLflow.
        resolved_config: nested plain values, logged as hyperparameters.
    """
    folder = Path(run_dir)
    loggers: list[Logger] = []
    if config.csv:
        loggers.append(MetricsFile(folder / "metrics.csv"))
    if config.tensorboard:
        loggers += _tensorboard(folder)
    for entry in loggers:
        entry.log_hyperparams(dict(resolved_config))
    if config.wandb is not None:
        loggers.append(_wandb(config.wandb, folder, run_name, resolved_config))
    if config.mlflow is not None:
        loggers.append(_mlflow(config.mlflow, folder, run_name, resolved_config))
    return loggers


def _tensorboard(folder: Path) -> list[Logger]:
    try:
        return [TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)]
    except ModuleNotFoundError:
        # It is on by default, so a minimal installation without it must still train.
        warn_once(
            logger,
            "logger.tensorboard=true, but tensorboard is not installed, so no event files are written: "
            f"{_INSTALL}, or set logger.tensorboard=false",
        )
        return []


def _wandb(config: WandbConfig, folder: Path, run_name: str, resolved: Mapping[str, Any]) -> Logger:
    with _explained("logger.wandb", "wandb login, logger.wandb.mode=offline or logger.wandb=null"):
        entry = WandbLogger(
            project=config.project,
            name=run_name,
            save_dir=folder,
            id=_identity(folder / "wandb-id.txt", lambda: uuid.uuid4().hex[:8]),
            offline=config.mode == "offline",
        )
        entry.log_hyperparams(dict(resolved))
    return entry


def _mlflow(config: MlflowConfig, folder: Path, run_name: str, resolved: Mapping[str, Any]) -> Logger:
    uri = config.uri or str(folder / "mlruns")
    if ":" not in uri:
        uri = f"file:{Path(uri).absolute()}"
    if uri.startswith("file:"):
        # Newer versions of MLflow require this to use a folder.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    identity = folder / "mlflow-id.txt"
    known = _known(identity)
    with _explained("logger.mlflow", "another logger.mlflow.uri or logger.mlflow=null"):
        entry = MLFlowLogger(
            experiment_name=_EXPERIMENT, run_name=run_name, tracking_uri=uri, save_dir=None, run_id=known
        )
        if known is None:  # MLflow refuses changed parameters, and a resumed run may have some
            entry.log_hyperparams(dict(resolved))
            _identity(identity, lambda: str(entry.run_id))
    return entry


@rank_zero_only
def _identity(path: Path, make: Callable[[], str]) -> str:
    """Return the id of this run in a logging service. It is created once and kept in the run folder."""
    known = _known(path)
    if known is not None:
        return known
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, made + "\n")
    return made


def _known(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return read_text(path).strip()
    except UnreadableError as problem:
        raise ConfigError(f"{path} {problem}: remove it to log the run as a new one", where=path) from None


@contextmanager
def _explained(key: str, otherwise: str) -> Iterator[None]:
    """Turn an exception of a logging library into a one-line error that names our key."""
    try:
        yield
    except ModuleNotFoundError as problem:
        raise UnavailableError(f"{key}: a package is not installed ({problem}): {_INSTALL}", key=key) from problem
    except Exception as problem:  # the libraries' own error classes, which may not be importable here
        raise UnavailableError(f"{key} cannot start ({one_line(problem)}): use {otherwise}", key=key) from problem
