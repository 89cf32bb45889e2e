"""Stops a run with a checkpoint after the current step when a signal announces that the machine will be taken away."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.checkpoints import Checkpoints
from megarl.callbacks.trainer_state import planned_steps, steps_taken, unit
from megarl.command import INTERRUPTED, NOTICED, STATUS_FILE, local_process_number
from megarl.logging import get_logger
from megarl.parallel.strategy import MegatronStrategy

log = get_logger(__name__)

# What SLURM, Kubernetes and users send before they kill a process.
NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_CTRL_C_NOTE = b"\nCtrl-C: saving and stopping once this step or phase is done (again: at once, without a checkpoint)\n"


class Preemption(Callback):
    """Stops all ranks after the same step, with a checkpoint, once any rank receives SIGTERM, SIGUSR1 or Ctrl-C.

    A second Ctrl-C stops at once, without a checkpoint. This replaces Lightning's signal handlers during training:
    those would communicate with other ranks inside a signal handler, save in another format and requeue the job
    themselves. Lightning restores the earlier handlers after the fit.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.notice: str | None = None
        self.interrupts = 0
        self.stopping = False
        self.outcome = 0  # INTERRUPTED by Ctrl-C on any rank; NOTICED if another signal left steps undone

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals
        for number in NOTICES:
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started with `&` in a shell: Ctrl-C is for the foreground process
            signal.signal(number, self._noticed)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save and stop if any rank received a signal."""
        strategy = trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        assert strategy.grid is not None
        if not strategy.grid.any_rank(self.notice is not None):
            return
        if not self.stopping:
            self.stopping = True
            reason = self.notice or "a signal to another rank"
            log.info("%s: saving and stopping after %s %d", reason, unit(trainer), steps_taken(trainer))
            self.checkpoints.stop(trainer)
            # Write the status now: an evaluation may follow, and the time until the kill may be short.
            planned = planned_steps(trainer)
            if strategy.grid.any_rank(self.notice == signal.SIGINT.name):
                self.outcome = INTERRUPTED
            elif planned is None or steps_taken(trainer) < planned:
                self.outcome = NOTICED
                self._write_status(f"stopped after {unit(trainer)} {steps_taken(trainer)}: start again\n")
        trainer.should_stop = True

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        """Record the signal, and nothing else: a handler may run between any two instructions."""
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts > 1:
                raise KeyboardInterrupt
            if local_process_number() == 0:
                os.write(2, _CTRL_C_NOTE)
        self.notice = self.notice or signal.Signals(number).name

    def _write_status(self, text: str) -> None:
        """Write the status file, from one process per node, as nodes may have separate file systems."""
        if STATUS_FILE in os.environ and local_process_number() == 0:
            Path(os.environ[STATUS_FILE]).write_text(text, encoding="utf-8")
