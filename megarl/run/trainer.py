"""The Lightning Trainer of a run: callbacks in order, loggers, devices and nodes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from megarl.callbacks.checkpoints import Checkpoints
from megarl.callbacks.collapse import Collapse
from megarl.callbacks.export import Export
from megarl.callbacks.findings import Findings, StopOnFinding
from megarl.callbacks.health import Health
from megarl.callbacks.heartbeat import HeartbeatCallback
from megarl.callbacks.initial_evaluation import InitialEvaluation
from megarl.callbacks.limits import StepLimit, TimeLimit, parse_duration
from megarl.callbacks.own import own_callbacks
from megarl.callbacks.ownership import Ownership
from megarl.callbacks.preemption import Preemption
from megarl.callbacks.progress import make_progress
from megarl.callbacks.report import Report
from megarl.callbacks.samples import Samples, Traces
from megarl.callbacks.step_axis import StepAxis
from megarl.callbacks.summary import Summary
from megarl.callbacks.throughput import Throughput
from megarl.checkpoint import ShardedCheckpointIO
from megarl.config.launcher import started_by_slurm
from megarl.config.leaf import or_defaults
from megarl.config.world import local_devices
from megarl.modules.base import Module
from megarl.parallel.strategy import MegatronStrategy
from megarl.run.loggers import build_loggers
from megarl.run.owner import RunLock
from megarl.run.run_folder import RunFolder


def build_trainer(
    config: Any, module: Module, folder: RunFolder, lock: RunLock, resolved: Mapping[str, Any]
) -> tuple[Trainer, Preemption]:
    """Return the Trainer, and the callback that stores how the run ended.

    Args:
        config: typed configuration tree of the run.
        module: the module to train.
        folder: folder of the run.
        lock: lock of that folder.
        resolved: the configuration as plain values, for the loggers and findings.
    """
    run_dir = folder.path
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint, _eval_every(config))
    preemption = Preemption(checkpoints)
    trainer = Trainer(
        **_machine(config),
        logger=build_loggers(config.logger, run_dir, run_dir.name, resolved),
        callbacks=_callbacks(config, module, folder, lock, checkpoints, preemption, resolved),
        max_steps=getattr(config.trainer, "max_steps", -1),  # StepLimit counts phases
        max_epochs=-1,
        val_check_interval=_eval_every(config),
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if _eval_every(config) else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=config.trainer.log_every,
        default_root_dir=run_dir,
    )
    return trainer, preemption


def idle_trainer(config: Any, run_dir: Path) -> Trainer:
    """Return a Trainer whose `fit` sets up the world, the models and the optimizers, restores a checkpoint, and trains
    nothing. They stay until `release` of its strategy."""
    return Trainer(
        **_machine(config, stays=True),
        logger=False,
        callbacks=[],
        limit_train_batches=0,
        enable_checkpointing=False,
        default_root_dir=run_dir,
    )


def _machine(config: Any, *, stays: bool = False) -> dict[str, Any]:
    """Return the Trainer's arguments that do not depend on what it is for."""
    io = ShardedCheckpointIO(config.checkpoint.async_save)
    return {
        "accelerator": config.trainer.accelerator,
        "devices": _devices(config),
        "num_nodes": _nodes(config),
        "strategy": MegatronStrategy(config.parallel, seed=config.seed, checkpoint_io=io, stays=stays),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


def _callbacks(
    config: Any,
    module: Module,
    folder: RunFolder,
    lock: RunLock,
    checkpoints: Checkpoints,
    preemption: Preemption,
    resolved: Mapping[str, Any],
) -> list[Callback]:
    """Return the callbacks in the order in which Lightning calls them; see `megarl/callbacks/__init__.py`."""
    run_dir = folder.path
    best, own, exports = config.checkpoint.best_settings, or_defaults(config, "extensions"), config.exports
    collapse = Collapse(best.metric, best.mode, checkpoints.best, lambda: module.scorer_fingerprints)
    findings, stop_on = Findings(run_dir, resolved), or_defaults(config, "health").stop_on
    callbacks: list[Callback] = [
        Ownership(lock.check),
        StepAxis(),
        InitialEvaluation(),
        StepLimit(),
        Throughput(or_defaults(config, "health").peak_tflops),
        Health(run_dir),
        *([StopOnFinding(stop_on, findings)] if stop_on else []),
        checkpoints,
        preemption,
        HeartbeatCallback(run_dir),
        *([Export(exports.hf, exports.peft)] if exports.folders else []),
        Samples(run_dir),
        Traces(run_dir),
        collapse,
        Summary(run_dir, collapse),
        findings,
        Report(run_dir),
        *make_progress(config.trainer.progress, config.trainer.log_every),
    ]
    if config.trainer.max_time is not None:
        callbacks.append(TimeLimit(parse_duration(config.trainer.max_time), checkpoints))
    return [*callbacks, *own_callbacks(own.callbacks, own.callback_options)]


def _eval_every(config: Any) -> int | None:
    return config.trainer.eval_every if config.data.eval else None


def _devices(config: Any) -> int:
    """Return the number of processes on this node: those that a launcher started, else the configured number."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if started_by_slurm(os.environ):
        return int(os.environ["SLURM_NTASKS"]) // int(os.environ.get("SLURM_NNODES", "1"))
    return local_devices(config)


def _nodes(config: Any) -> int:
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    if started_by_slurm(os.environ):
        return int(os.environ.get("SLURM_NNODES", "1"))
    return int(config.trainer.num_nodes)
