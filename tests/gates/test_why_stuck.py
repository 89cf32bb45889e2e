"""A PPO run whose rank 1 is stopped in each part of a phase: `why_stuck` names rank 1 and the part."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megarl import why_stuck
from megarl.callbacks.heartbeat import HeartbeatCallback
from megarl.heartbeat import Heartbeat, diagnose, read
from tests.e2e.runs import run_ppo
from tests.worlds import Worlds


def stops_in(run_dir: Path, part: str) -> None:
    """PPO over two processes, of which the second is stopped in that part of its second phase."""
    from megarl.run import trainer

    class Stop(HeartbeatCallback):
        def __init__(self, run_dir: Path) -> None:
            super().__init__(run_dir, beat_s=0.2)
            self.stopped = False

        def _enter(self, phase: str) -> None:
            super()._enter(phase)
            if dist.get_rank() == 1 and phase == part and self.heartbeat.step == 1 and not self.stopped:
                self.stopped = True
                os.kill(os.getpid(), signal.SIGSTOP)

    real, trainer.HeartbeatCallback = trainer.HeartbeatCallback, Stop  # type: ignore[attr-defined,misc]
    try:
        run_ppo(run_dir, "parallel.tp=2", "checkpoint.save_last=true", "trainer.eval_every=1")
    finally:
        trainer.HeartbeatCallback = real  # type: ignore[attr-defined]


@pytest.mark.gate
@pytest.mark.parametrize("part", ["generate", "score", "evaluate", "shape", "train", "eval"])
def test_the_stopped_rank_and_its_part_are_named(
    part: str, worlds: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = threading.Thread(target=lambda: worlds.run(2, stops_in, tmp_path, part))
    runs.start()
    try:
        deadline = time.monotonic() + 240
        while not named(tmp_path):
            assert time.monotonic() < deadline, [str(heartbeat.__dict__) for heartbeat in read(tmp_path)]
            assert runs.is_alive(), "it was never stopped"
            time.sleep(0.2)
        assert why_stuck.run([str(tmp_path), "beat=1"]) == 0
    finally:
        for heartbeat in read(tmp_path):
            os.kill(heartbeat.pid, signal.SIGCONT)
        runs.join()
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence.startswith("rank 1 (")
    assert f"in {part} of step 1" in sentence.split(";")[0]
    assert "1 of 2 ranks wait for it" in sentence


def named(run_dir: Path) -> bool:
    """Rank 1 is; before it is stopped, others may well be waited for, as for a reward function that starts."""
    heartbeats = read(run_dir)
    return bool(heartbeats) and diagnose(heartbeats, time.time(), beat_s=1).ranks == (1,) and silent(heartbeats[1])


def silent(heartbeat: Heartbeat) -> bool:
    return time.time() - heartbeat.alive > 3
