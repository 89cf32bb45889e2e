"""A notice that the machine is about to be taken away ends a run at the next edge of a step, with a checkpoint."""

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

NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # what SLURM, Kubernetes and people send before they kill
_SAID = b"\nCtrl-C: saving and stopping once this step or phase is done (again: at once, without a checkpoint)\n"


class Preemption(Callback):
    """Any rank's SIGTERM, SIGUSR1 or Ctrl-C stops all ranks after the same step, once its checkpoint is committed.

    A second Ctrl-C stops at once, without a checkpoint. Takes the place of Lightning's handlers while training: those
    would talk to other ranks from inside a signal, save in another format and requeue the job themselves. When the fit
    is over, Lightning puts back what was there before.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.notice: str | None = None
        self.interrupts = 0
        self.stopping = False
        self.outcome = 0  # INTERRUPTED by some rank's Ctrl-C, NOTICED where a notice left steps undone

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals
        for number in NOTICES:
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue  # a shell's `&`: Ctrl-C is for others
            signal.signal(number, self._noticed)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        assert strategy.grid is not None
        if not strategy.grid.any_rank(self.notice is not None):
            return
        if not self.stopping:
            self.stopping = True
            reason = self.notice or "a notice to another rank"
            log.info("%s: saving and stopping after %s %d", reason, unit(trainer), steps_taken(trainer))
            self.checkpoints.stop(trainer)
            # At once: an evaluation may be due now, and the notice may be short.
            planned = planned_steps(trainer)
            if strategy.grid.any_rank(self.notice == signal.SIGINT.name):
                self.outcome = INTERRUPTED
            elif planned is None or steps_taken(trainer) < planned:
                self.outcome = NOTICED
                self._leave_word(f"stopped after {unit(trainer)} {steps_taken(trainer)}: start again\n")
        trainer.should_stop = True

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        """Only a note: a handler may run between any two instructions."""
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts > 1:
                raise KeyboardInterrupt
            if local_process_number() == 0:
                os.write(2, _SAID)
        self.notice = self.notice or signal.Signals(number).name

    def _leave_word(self, text: str) -> None:
        """One process of a node for all of it: nodes may have file systems of their own."""
        if STATUS_FILE in os.environ and local_process_number() == 0:
            Path(os.environ[STATUS_FILE]).write_text(text, encoding="utf-8")
