"""Processes of trials: their share of the machine, that they are stopped and end with the sweep, and Ray."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.errors import ConfigError, UnavailableError
from megarl.trials.jobs import Backend, Job, LocalJobs, RayJobs, Running
from tests.refusals import refused


def job(folder: Path, code: str, **environment: str) -> Job:
    return Job([sys.executable, "-c", code], folder / "log.txt", environment)


def ended(running: Running, seconds: float = 60.0) -> int:
    end = time.monotonic() + seconds
    while (code := running.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return code


def test_a_job_has_its_share_of_cores_and_gpus_and_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    backend: Backend = LocalJobs(2, cpus=3, gpus=2)
    show = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'], os.environ['MINE'])"
    jobs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        jobs.append(backend.start(job(tmp_path / name, show, MINE=name)))
    assert [ended(one) for one in jobs] == [0, 0]
    assert (tmp_path / "a" / "log.txt").read_text() == "3 4,5 a\n"
    assert (tmp_path / "b" / "log.txt").read_text() == "3 6,7 b\n"
    assert ended(backend.start(job(tmp_path, "raise SystemExit(3)"))) == 3  # in a slot that is free again


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with refused(ConfigError, key="sweep.gpus", value=2, offers={"sweep.at_once": [1]}):
        LocalJobs(2, gpus=2)


def test_a_program_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, key="sweep.launcher", value="no-such-program"):
        LocalJobs(1).start(Job(["no-such-program"], tmp_path / "log.txt", {}))


def test_a_stopped_job_gets_sigterm(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, lambda *_: exit(7)); print('up', flush=True); time.sleep(60)"
    running = LocalJobs(1).start(job(tmp_path, code))
    _wait_for_text(tmp_path / "log.txt", "up")
    running.stop()
    assert ended(running) == 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_job_is_told_when_its_sweep_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, lambda *_: exit(print('told', flush=True))); print('up', flush=True)"
    parent = (
        "import sys, time; from pathlib import Path; from megarl.trials.jobs import Job, LocalJobs; "
        f"LocalJobs(1).start(Job([sys.executable, '-c', {code + '; time.sleep(60)'!r}], Path({str(tmp_path)!r}) / "
        "'log.txt', {})); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    _wait_for_text(tmp_path / "log.txt", "up")
    process.kill()
    process.wait()
    _wait_for_text(tmp_path / "log.txt", "told")


def _wait_for_text(path: Path, text: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ray_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused(UnavailableError, key="sweep.backend", value="ray", names=("pip install ray",)):
        RayJobs()


def test_ray_runs_the_command_with_its_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def remote(**resources: Any) -> Any:
        asked.update(resources)
        return lambda function: SimpleNamespace(remote=lambda *given: (function, given))

    fake = SimpleNamespace(
        init=lambda **_: None,
        remote=remote,
        wait=lambda results, timeout: (results, []),
        get=lambda result: result[0](*result[1]),
        cancel=lambda *_, **__: None,
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    running = RayJobs(cpus=2, gpus=1).start(job(tmp_path, "import os; print(os.environ['MINE'])", MINE="yes"))
    assert asked == {"num_cpus": 2, "num_gpus": 1}
    assert running.poll() == 0
    assert (tmp_path / "log.txt").read_text() == "yes\n"
    assert os.environ.get("MINE") is None
