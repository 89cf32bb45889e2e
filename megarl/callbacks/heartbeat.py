"""Writes heartbeats of each process, from which `megarl.why_stuck` finds what a stalled run waits for."""

import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import steps_taken
from megarl.errors import one_line
from megarl.heartbeat import BEAT_S, Heartbeat, HeartbeatFile

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_FOREIGN = ("/torch/", "/threading.py", "/contextlib.py")


class HeartbeatCallback(Callback):
    """Writes `breadcrumbs/rank-N.json` in the run folder whenever the clock's section changes, and every few seconds.

    A thread writes the regular heartbeat, with the line that the main thread executes. A process that waits in a
    collective continues to write and names the collective; one that is stopped or dead does not write.
    `python -m megarl.why_stuck RUN` reads the files.
    """

    def __init__(self, run_dir: str | os.PathLike[str], beat_s: float = BEAT_S) -> None:
        self.run_dir, self.beat_s = Path(run_dir), beat_s
        self._file: HeartbeatFile | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._beating: threading.Thread | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the first heartbeat and start the thread."""
        if self._file is not None:
            return
        self.trainer = trainer
        self.heartbeat = Heartbeat(trainer.global_rank, trainer.world_size, socket.gethostname(), os.getpid())
        self._file = HeartbeatFile(self.run_dir, trainer.global_rank)
        self._enter("setup")
        clock = getattr(pl_module, "clock", None)
        if clock is not None:
            clock.listen(self._enter)
        self._beating = threading.Thread(target=self._beat, args=(threading.get_ident(),), daemon=True)
        self._beating.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a heartbeat at the step that the run starts from."""
        self._enter("")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write a heartbeat with the new step."""
        self._enter("")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write a last heartbeat with `ended` set to finished."""
        self._end("finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write a last heartbeat with the error."""
        self._end(one_line(exception) or "an exception")

    def _enter(self, phase: str) -> None:
        now = time.time()
        with self._lock:
            heartbeat = self.heartbeat
            heartbeat.phase, heartbeat.step = phase, steps_taken(self.trainer)
            heartbeat.since = heartbeat.alive = heartbeat.still = now
            heartbeat.collective = heartbeat.at = ""
            self._write()

    def _beat(self, watched: int) -> None:
        while not self._over.wait(self.beat_s):
            collective, at = whereabouts(sys._current_frames().get(watched))
            now = time.time()
            with self._lock:
                if (collective, at) != (self.heartbeat.collective, self.heartbeat.at):
                    self.heartbeat.still = now
                self.heartbeat.collective, self.heartbeat.at, self.heartbeat.alive = collective, at, now
                self._write()

    def _end(self, reason: str) -> None:
        """Write the last heartbeat. Later calls do nothing, as teardown follows a failure too."""
        self._over.set()
        with self._lock:
            if self._file is None:
                return
            self.heartbeat.ended, self.heartbeat.alive = reason, time.time()
            self._write()
            self._file.close()
            self._file = None

    def _write(self) -> None:
        if self._file is not None:
            self._file.write(self.heartbeat)


def whereabouts(frame: FrameType | None) -> tuple[str, str]:
    """Return the collective that a thread waits in ("" for none), and its innermost line outside torch, as file:line
    name."""
    collective = at = ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.endswith(_COLLECTIVES) and not name.startswith("_"):
            collective = name  # the outermost call, which is the one that was made
        if not at and not any(part in path for part in _FOREIGN):
            at = f"{_short_path(frame)}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return collective, at


def _short_path(frame: FrameType) -> str:
    """Return the end of a frame's path. Code without a file (a function pickled by value) is named by its module."""
    path = frame.f_code.co_filename
    if path.startswith("<"):
        return str(frame.f_globals.get("__name__", path))
    return "/".join(Path(path).parts[-2:])
