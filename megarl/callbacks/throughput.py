"""Throughput and peak memory of a run. This only measures and must not influence training."""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import logging_interval
from megarl.clock import Work


class _Step(NamedTuple):
    seconds: float
    work: Work | None


class Throughput(Callback):
    """Logs `perf/*`: means over the steps since metrics were last logged.

    A step lasts from the end of the step before to its own end. That includes waiting for data, but not evaluation and
    checkpoints. The first step of a process, which warms up, is left out as soon as there is another. The module
    reports the work of a step in `module.work`, summed over all processes.
    """

    def __init__(self, peak_tflops: float | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            peak_tflops: peak of one device in TFLOP/s; without it no utilisation is logged.
            now: returns the time in seconds; tests pass their own.
        """
        self.peak_tflops = peak_tflops
        self._now = now
        self._steps: deque[_Step] = deque()
        self._warm = False
        self._elapsed = 0.0
        self._since: float | None = None  # None while the stopwatch is paused

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the measurements."""
        # As many steps as there are between two loggings, so that the logged means cover exactly those.
        self._steps = deque(maxlen=logging_interval(trainer))
        self._warm, self._elapsed, self._since = False, 0.0, None

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the stopwatch, unless it runs since the end of the last step."""
        if self._since is None:
            self._since = self._now()

    def on_validation_start(self, *_: Any) -> None:
        """Pause the stopwatch during the evaluation."""
        self._pause()

    def on_save_checkpoint(self, *_: Any) -> None:
        """Pause the stopwatch while a checkpoint is saved."""
        self._pause()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the step's time and work, and log the means."""
        # The step is done on the device too, as its gradient norm has been read.
        self._pause()
        if self._steps and not self._warm:
            self._steps.clear()
            self._warm = True
        self._steps.append(_Step(self._elapsed, getattr(pl_module, "work", None)))
        self._elapsed, self._since = 0.0, self._now()
        pl_module.log_dict(self._metrics(trainer.world_size))

    def _pause(self) -> None:
        """Pause the stopwatch; the next batch starts it again."""
        if self._since is not None:
            self._elapsed += self._now() - self._since
            self._since = None

    def _metrics(self, world_size: int) -> dict[str, float]:
        seconds = sum(step.seconds for step in self._steps)
        metrics = {
            "perf/step_seconds": seconds / len(self._steps),
            "perf/peak_memory_gb": peak_memory_gb(),
        }
        work = [step.work for step in self._steps if step.work is not None]
        if len(work) == len(self._steps) and seconds > 0:
            metrics["perf/tokens_per_second"] = sum(w.tokens for w in work) / seconds
            if self.peak_tflops is not None:
                peak = self.peak_tflops * 1e12 * world_size
                metrics["perf/mfu"] = sum(w.flops for w in work) / (seconds * peak)
        return metrics


def peak_memory_gb() -> float:
    """Return the peak memory of this process in 10^9 bytes: on its GPU if it uses one, else resident in RAM."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def memory_gb() -> float:
    """Return the memory that this process uses now, in 10^9 bytes and counted as in `peak_memory_gb`. No GPU is waited
    for, as torch counts what it gave out."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9
