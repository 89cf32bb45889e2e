"""From a typed configuration to a finished run: the code that all entry points share."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.callbacks.own import failure_of
from megarl.checkpoint import ShardedCheckpointIO, find, plain_content, refuse_empty
from megarl.command import process_number, quiet
from megarl.config.algorithms import Algorithm, find_algorithm
from megarl.config.devices import hide_gpus
from megarl.config.elastic import fitted
from megarl.config.extensions import named_extensions
from megarl.config.launcher import check_launcher
from megarl.config.leaf import or_defaults
from megarl.config.resume import differences, refuse
from megarl.config.world import world_size
from megarl.disk import local
from megarl.errors import CheckpointError, ConfigError, MegarlError, one_line
from megarl.functions.extensions import fingerprints
from megarl.logging import get_logger, setup
from megarl.models.exchange.export import refuse_existing
from megarl.models.exchange.families import require_family
from megarl.models.exchange.pretrained import Sources, resolve_pretrained
from megarl.models.exchange.source import family_name
from megarl.modules.base import Module
from megarl.progress import choose_display
from megarl.run.exp_manager import attach_nemo_exp_manager
from megarl.run.owner import RunLock, owned
from megarl.run.prediction import write_prediction
from megarl.run.run_folder import RunFolder, resolve_run_dir
from megarl.run.starts import start_of
from megarl.run.trainer import build_trainer

log = get_logger(__name__)
RUN_DIR = "MEGARL_RUN_DIR"  # passes the run folder of the first process to the processes that it starts


Build = Callable[[Any, Sources], Module]


def run_training(entry: str, config: Any, build: Build) -> int:
    """Check the configuration, build the module, train it, and write a run folder. Return the exit code: INTERRUPTED or
    NOTICED if the run was stopped early, with a checkpoint.

    `build(config, sources)` makes the module before any process group exists; `configure_model` makes its models.
    `build` gets the configuration with the architecture and tokenizer of the model at `model.path` (the same tree where
    that is null), and the stored models opened for it. The `config` argument is not changed.

    Args:
        entry: name of the algorithm.
        config: typed configuration tree.
        build: makes the module.
    """
    with opened_run(entry, config, build) as run:
        return _train(run)


@dataclass(frozen=True)
class Run:
    """A run before its world exists.

    Attributes:
        config: the configuration, with the architecture of the model at `model.path`.
        resolved: the same as plain values, for loggers.
        module: the module, without models yet.
        folder: the run's folder.
        lock: the lock of that folder.
    """

    config: Any
    resolved: dict[str, Any]
    module: Module
    folder: RunFolder
    lock: RunLock


@contextmanager
def opened_run(entry: str, config: Any, build: Build) -> Iterator[Run]:
    """Check the configuration, lock the folders that the run writes, and build the module; close it at the end. The
    arguments are those of `run_training`."""
    check_launcher(os.environ)
    algorithm = find_algorithm(entry)
    with hide_gpus(config.trainer.accelerator):
        configured = config
        config, fit = fitted(configured, world_size(configured, os.environ))
        resume = config.run.resume
        if resume not in ("auto", "never"):
            refuse_empty(Path(resume))
        run_dir = Path(os.environ.get(RUN_DIR) or resolve_run_dir(algorithm.name, config)).absolute()
        os.environ[RUN_DIR] = str(run_dir)
        try:
            folder = RunFolder(run_dir)
            with _owned(config, run_dir) as lock:
                _set_up_log(config, run_dir)
                if fit is not None:
                    log.log(WARNING if fit.share > 1 else INFO, "%s", fit.told(configured))
                run = _build(algorithm, config, folder, lock, build)
                try:
                    yield run
                finally:
                    run.module.close()
        finally:
            os.environ.pop(RUN_DIR, None)


@contextmanager
def _owned(config: Any, run_dir: Path) -> Iterator[RunLock]:
    """Take the lock of every folder that this run writes, before anything is written there."""
    timeout_s = config.parallel.timeout_s
    with ExitStack() as stack:
        lock = stack.enter_context(owned(run_dir, timeout_s))
        dump = config.rollout.dump if hasattr(config, "rollout") else None
        if dump is not None:
            stack.enter_context(owned(local(dump), timeout_s, key="rollout.dump"))
        for key, folder in config.exports.folders.items():
            stack.enter_context(owned(local(folder), timeout_s, key=key, beside=True))
        yield lock


def _set_up_log(config: Any, run_dir: Path) -> None:
    with _writing(run_dir):
        setup(run_dir, rank=process_number(), debug=config.debug)
    choose_display(config.trainer.progress)


def _build(algorithm: Algorithm, config: Any, folder: RunFolder, lock: RunLock, build: Build) -> Run:
    run_dir = folder.path
    config, sources = resolve_pretrained(config)
    for exported in config.exports.folders.values():
        refuse_existing(local(exported))
    if config.exports.folders:
        require_family(config.model, family_name(sources.at(config.model.path)), next(iter(config.exports.folders)))
    quiet()
    resolved = asdict(config)
    _refuse_other_settings(config, resolved, run_dir)
    if process_number() == 0:
        with _writing(run_dir):
            folder.write_config(resolved)
            folder.write_environment()
            folder.write_extensions(fingerprints(named_extensions(config)))
            folder.append_start(start_of(config, os.environ))
    module = build(config, sources)
    module.entry, module.unit = algorithm.name, algorithm.unit
    if process_number() == 0:
        with _writing(run_dir):
            write_prediction(folder, algorithm.name, config, module)
    return Run(config, resolved, module, folder, lock)


def _refuse_other_settings(config: Any, resolved: dict[str, Any], run_dir: Path) -> None:
    """Refuse settings that the newest checkpoint cannot go on with, before anything in the run's folder changes.

    What its tokenizer, weights and algorithm allow is compared when it is restored, and so is damage found.
    """
    resumed = resume_from(config.run.resume, run_dir)
    if resumed is None:
        return
    newest = (find(Path(resumed)) or [Path(resumed)])[-1]
    try:
        saved = plain_content(newest)[0]["run"]
        found = differences(saved["config"], saved["started_as"], resolved, tree=type(config), same_tokenizer=True)
    except (MegarlError, LookupError, TypeError, ValueError, AttributeError):
        return
    refuse(found, str(newest))


def _train(run: Run) -> int:
    config, module, run_dir = run.config, run.module, run.folder.path
    trainer, preemption = build_trainer(config, module, run.folder, run.lock, run.resolved)
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, ShardedCheckpointIO)
    extensions = or_defaults(config, "extensions")
    if extensions.nemo:
        attach_nemo_exp_manager(trainer, extensions.exp_manager, run_dir)
    gc.freeze()  # every save collects garbage; exclude the objects that imports made
    try:
        with damage_told(io, or_defaults(config, "extensions").callbacks):
            restored = resume_from(config.run.resume, run_dir)
            module.resumes = restored is not None
            trainer.fit(module, ckpt_path=restored)
    except SystemExit as ending:
        # Before training, or at a second Ctrl-C, Lightning exits with 1.
        if isinstance(ending.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        gc.unfreeze()
    return preemption.outcome


@contextmanager
def damage_told(io: ShardedCheckpointIO, callbacks: Sequence[str] = ()) -> Iterator[None]:
    """Raise an exception of a user's callback, or of a checkpoint that cannot be restored, as an error of one line."""
    try:
        yield
    except Exception as problem:
        told = _explained(problem, io.restoring, callbacks)
        if told is None:
            raise
        raise told from problem


def _explained(problem: Exception, restoring: Path | None, callbacks: Sequence[str]) -> MegarlError | None:
    """Return the error of one line for an exception of a user's callback, or of a checkpoint that cannot be restored;
    None for one that has its line, and for a bug."""
    if isinstance(problem, MegarlError):
        return None
    if (of_callback := failure_of(problem, callbacks)) is not None:
        return of_callback
    damaged = isinstance(problem, LookupError | TypeError | ValueError | AttributeError | RuntimeError)
    if restoring is None or not damaged or isinstance(problem, torch.OutOfMemoryError | dist.DistError):
        return None
    return CheckpointError(
        f"checkpoint {restoring} cannot be restored ({one_line(problem)}): it is damaged or was written by another "
        "version; choose another with run.resume=FOLDER",
        key="run.resume",
        where=restoring,
    )


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise ConfigError(
            f"run.dir={run_dir} cannot be written ({problem}): set run.dir to another folder",
            key="run.dir",
            value=str(run_dir),
        ) from None


def resume_from(resume: str, run_dir: Path) -> str | None:
    """Return the checkpoint to restore, or the folder whose newest intact checkpoint is chosen once all ranks are up;
    None for a new run."""
    if resume == "never":
        return None
    if resume != "auto":
        return str(Path(resume).absolute())
    folder = run_dir / "checkpoints"
    return str(folder) if find(folder) else None
