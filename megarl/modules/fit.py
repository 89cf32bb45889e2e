"""From a typed configuration to a finished run: the part that all entry points share."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from megarl.callbacks.baseline import Baseline
from megarl.callbacks.breadcrumbs import Breadcrumbs
from megarl.callbacks.checkpoints import Checkpoints
from megarl.callbacks.collapse import Collapse
from megarl.callbacks.exp_manager import hand_to_nemo
from megarl.callbacks.export import Export
from megarl.callbacks.health import Health
from megarl.callbacks.limits import StepLimit, TimeLimit, parse_duration
from megarl.callbacks.loggers import StepAxis, build_loggers
from megarl.callbacks.owner import Ownership, RunLock, owned
from megarl.callbacks.preemption import Preemption
from megarl.callbacks.progress import make_progress
from megarl.callbacks.run_folder import RunFolder, resolve_run_dir
from megarl.callbacks.samples import Samples
from megarl.callbacks.summary import Summary, one_line
from megarl.callbacks.throughput import Throughput
from megarl.checkpoint import ShardedCheckpointIO, find, refuse_empty
from megarl.command import process_number, quiet
from megarl.config import checks
from megarl.config.algorithms import ALGORITHMS, Algorithm
from megarl.config.devices import hide_gpus
from megarl.config.launcher import check_launcher, started_by_slurm
from megarl.disk import local
from megarl.errors import CheckpointError, ConfigError
from megarl.logging import get_logger, setup
from megarl.models.exchange.export import refuse_existing
from megarl.models.exchange.families import require_family
from megarl.models.exchange.pretrained import Sources, resolve_pretrained
from megarl.models.exchange.source import family_name
from megarl.modules.base import Module
from megarl.parallel.strategy import MegatronStrategy

log = get_logger(__name__)
RUN_DIR = "MEGARL_RUN_DIR"  # tells the processes that a run starts where the first one put it


Build = Callable[[Any, Sources], Module]


def fit(entry: str, config: Any, build: Build) -> int:
    """Check, build, train, and leave a run folder behind. Returns the exit code; INTERRUPTED or NOTICED where the run
    was stopped early, with a checkpoint.

    `build(config, sources)` makes the module, before any process group exists; its models are made in
    `configure_model`. It is given a tree with the shape and the tokenizer of the model at `model.path`, and the stored
    models that were opened for it. The tree that `fit` was given is left as it is.
    """
    check_launcher(os.environ)
    with hide_gpus(config.trainer.accelerator):
        checks.check(config, checks.world_size(config, os.environ))
        resume = config.run.resume
        if resume not in ("auto", "never"):
            refuse_empty(Path(resume))
        run_dir = Path(os.environ.get(RUN_DIR) or resolve_run_dir(entry, config)).absolute()
        os.environ[RUN_DIR] = str(run_dir)
        try:
            folder = RunFolder(run_dir)
            with _owned(config, run_dir) as lock:
                return _fit(ALGORITHMS[entry], config, folder, lock, build)
        finally:
            os.environ.pop(RUN_DIR, None)


@contextmanager
def _owned(config: Any, run_dir: Path) -> Iterator[RunLock]:
    """Hold every folder that this run writes, before anything is written there."""
    timeout_s = config.parallel.timeout_s
    with ExitStack() as stack:
        lock = stack.enter_context(owned(run_dir, timeout_s))
        dump = config.rollout.dump if hasattr(config, "rollout") else None
        if dump is not None:
            stack.enter_context(owned(local(dump), timeout_s, key="rollout.dump"))
        if config.export.hf is not None:
            stack.enter_context(owned(local(config.export.hf), timeout_s, key="export.hf", beside=True))
        yield lock


def _fit(algorithm: Algorithm, config: Any, folder: RunFolder, lock: RunLock, build: Build) -> int:
    run_dir = folder.path
    with _writing(run_dir):
        setup(run_dir, rank=process_number(), debug=config.debug)
    config, sources = resolve_pretrained(config)
    if config.export.hf is not None:
        refuse_existing(local(config.export.hf))
        require_family(config.model, family_name(sources.at(config.model.path)), "export.hf")
    quiet()
    resolved = asdict(config)
    if process_number() == 0:
        with _writing(run_dir):
            folder.write_config(resolved)
            folder.write_environment()
    module = build(config, sources)
    module.entry, module.unit = algorithm.name, algorithm.unit
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint, _eval_every(config))
    preemption = Preemption(checkpoints)
    collapse = Collapse(
        config.checkpoint.metric, config.checkpoint.mode, checkpoints.best, lambda: module.scorer_fingerprints
    )
    callbacks: list[Callback] = [
        Ownership(lock),
        StepAxis(),
        Baseline(),
        StepLimit(),
        Throughput(config.trainer.peak_tflops),
        Health(run_dir),
        checkpoints,
        preemption,
        Breadcrumbs(run_dir),
        *([Export(config.export.hf)] if config.export.hf is not None else []),
        Samples(run_dir),
        collapse,
        Summary(run_dir, collapse),
        *make_progress(config.trainer.progress, config.trainer.log_every),
    ]
    if config.trainer.max_time is not None:
        callbacks.append(TimeLimit(parse_duration(config.trainer.max_time), checkpoints))
    io = ShardedCheckpointIO(config.checkpoint.async_save)
    trainer = Trainer(
        accelerator=config.trainer.accelerator,
        devices=_devices(config),
        num_nodes=_nodes(config),
        strategy=MegatronStrategy(config.parallel, seed=config.seed, checkpoint_io=io),
        logger=build_loggers(config.logger, run_dir, run_dir.name, resolved),
        callbacks=callbacks,
        max_steps=getattr(config.trainer, "max_steps", -1),  # phases are counted by StepLimit
        max_epochs=-1,
        val_check_interval=_eval_every(config),
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if _eval_every(config) else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=config.trainer.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )
    if config.trainer.exp_manager == "nemo":
        hand_to_nemo(trainer, config.trainer.exp_manager_options, run_dir)
    gc.freeze()  # every save collects garbage: let it not look through all that imports have made
    try:
        restored = resume_from(config.run.resume, run_dir)
        module.resumes = restored is not None
        trainer.fit(module, ckpt_path=restored)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        if io.restoring is None or isinstance(problem, torch.OutOfMemoryError | dist.DistError):
            raise
        raise CheckpointError(
            f"checkpoint {io.restoring} cannot be restored ({one_line(problem)}): it is damaged, or of another "
            "version; choose another with run.resume=FOLDER",
            key="run.resume",
            where=io.restoring,
        ) from problem
    except SystemExit as ending:
        if isinstance(ending.__context__, KeyboardInterrupt):  # before training, or again: Lightning exits with 1
            raise KeyboardInterrupt from None
        raise
    finally:
        gc.unfreeze()
        module.close()
    return preemption.outcome


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise ConfigError(
            f"run.dir={run_dir} cannot be written ({problem}): set run.dir elsewhere", key="run.dir", value=str(run_dir)
        ) from None


def resume_from(resume: str, run_dir: Path) -> str | None:
    """What Lightning is to restore: a checkpoint, or a folder whose newest whole one is taken when all ranks are up."""
    if resume == "never":
        return None
    if resume != "auto":
        return str(Path(resume).absolute())
    folder = run_dir / "checkpoints"
    return str(folder) if find(folder) else None


def _eval_every(config: Any) -> int | None:
    return config.trainer.eval_every if config.data.eval else None


def _devices(config: Any) -> int:
    """Processes on this node: what a launcher started, else what the configuration asks for."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if started_by_slurm(os.environ):
        return int(os.environ["SLURM_NTASKS"]) // int(os.environ.get("SLURM_NNODES", "1"))
    return checks.local_devices(config)


def _nodes(config: Any) -> int:
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    if started_by_slurm(os.environ):
        return int(os.environ.get("SLURM_NNODES", "1"))
    return int(config.trainer.num_nodes)
