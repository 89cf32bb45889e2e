"""`sbatch launchers/ppo.sh` and its like on a real Slurm of two nodes: the same numbers, notices, deaths, chains."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.heartbeat import Heartbeat, read
from megarl.run.owner import RunLock
from tests.e2e.runs import SMALL, WALKS, assert_same_bits, final_tensors, metrics, run_ppo, run_sft
from tests.refusals import assert_command_refused
from tests.slurm.cluster import Cluster
from tests.worlds import Worlds

# Two nodes on one machine need it to themselves: `make slurm` runs the short ones, `make gates` the others too.
pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
SFT = ROOT / "launchers" / "sft.sh"
TWO = ("--nodes=2", "--ntasks-per-node=1")
LONG = ("trainer.max_steps=300", "checkpoint.every=100")  # seconds of steps, so that something can happen in between
TINY = [*SMALL, "model.num_layers=2", "model.hidden_size=32", "data.seq_length=32"]
THREADS = {"OMP_NUM_THREADS": "1"}
PATIENCE_S = 240.0


class Job:
    """A submitted launcher."""

    def __init__(
        self, cluster: Cluster, folder: Path, *overrides: str, options: tuple[str, ...] = TWO, **environ: str
    ) -> None:
        self.cluster, self.folder, self.run_dir = cluster, folder, folder / "run"
        command = [*options, f"--output={folder}/job.log", SFT, *TINY, f"run.dir={self.run_dir}", *overrides]
        self.number = cluster.submit(*command, cwd=folder, **THREADS, **environ)

    def ends(self, *states: str, seconds: float = PATIENCE_S) -> str:
        return self.cluster.wait_for(self.number, states, seconds, logs=self.folder)

    def state(self) -> str:
        return self.cluster.state(self.number)

    def rank(self, rank: int, when: Callable[[Heartbeat], bool]) -> Heartbeat:
        """What a rank says of itself, once it says something of that kind."""
        found: list[Heartbeat] = []

        def met() -> bool:
            found[:] = [heartbeat for heartbeat in read(self.run_dir) if heartbeat.rank == rank and when(heartbeat)]
            return bool(found)

        self.cluster.wait(met, f"rank {rank} never came to it: {self.log()}", PATIENCE_S)
        return found[0]

    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def steps(self) -> list[int]:
        return [int(step) for (step,) in metrics(self.run_dir, "step")]


def test_ppo_over_two_nodes_has_the_numbers_of_one_process(cluster: Cluster, worlds: Worlds, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*WALKS, "parallel.tp=2", f"run.dir={run_dir}"]
    launcher = ROOT / "launchers" / "ppo.sh"
    number = cluster.submit(*TWO, f"--output={tmp_path}/job.log", launcher, *overrides, cwd=tmp_path, **THREADS)
    worlds.run(1, run_ppo, tmp_path / "alone")
    cluster.wait_for(number, ("COMPLETED", "FAILED"), PATIENCE_S, logs=tmp_path)
    log = (tmp_path / "job.log").read_text()
    assert cluster.state(number) == "COMPLETED", log
    names = ("rollout/score", "train/loss", "train/grad_norm", "value/loss")
    here, alone = metrics(run_dir, *names), metrics(tmp_path / "alone", *names)
    assert len(here) == 2
    for ours, theirs in zip(here, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert "layout: 2 processes = 2 per model x 1 replicas, on cpu" in log
    assert "run folder:" in log, "the first process's console is shown in the job's output"
    logs = (run_dir / "console" / number).glob("*.log")
    assert sorted(path.name for path in logs) == ["rank-0000.log", "rank-0001.log"]


def test_a_notice_leads_to_a_requeue_and_an_exact_continuation(
    cluster: Cluster, worlds: Worlds, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, *LONG)
    job.rank(1, lambda heartbeat: heartbeat.step >= 3)
    cluster.run("scancel", "--signal=USR1", job.number)
    worlds.run(2, run_sft, tmp_path / "unbroken", *TINY, *LONG)
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1", f"no requeue: {job.log()}", PATIENCE_S)
    assert job.ends("COMPLETED", "FAILED") == "COMPLETED", job.log()
    assert "saving and stopping after step" in job.log()
    assert job.steps() == list(range(1, 301)), "no step is missing or done twice"
    assert_same_bits(final_tensors(job.run_dir), final_tensors(tmp_path / "unbroken"))


def test_a_layout_that_does_not_fit_stops_before_any_node_works(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "parallel.tp=4")
    assert job.ends("COMPLETED", "FAILED") == "FAILED"
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert "parallel.tp=4" in job.log()
    assert "do not divide the 2 processes" in job.log()
    assert not job.run_dir.exists()


@pytest.mark.parametrize("launcher", sorted(path.name for path in (ROOT / "launchers").glob("*.sh")))
def test_slurm_takes_every_launcher(launcher: str, cluster: Cluster) -> None:
    if launcher in ("shared.sh", "chain.sh"):
        return
    assert "to start at" in cluster.run("sbatch", "--test-only", *TWO, ROOT / "launchers" / launcher, cwd=ROOT)


@pytest.mark.gate
def test_a_plain_srun_without_a_launcher_is_a_world_too(cluster: Cluster, worlds: Worlds, tmp_path: Path) -> None:
    """MASTER_ADDR: Lightning takes the first node's name for its address, which it is not on this machine."""
    settings = [*TINY, "trainer.max_steps=3"]
    command = [sys.executable, "-m", "megarl.train_sft", *settings, "parallel.tp=2", f"run.dir={tmp_path}/run"]
    cluster.run("srun", *TWO, *command, cwd=ROOT, seconds=PATIENCE_S, **THREADS, MASTER_ADDR="127.0.0.1")
    worlds.run(1, run_sft, tmp_path / "alone", *settings)
    here, alone = (metrics(tmp_path / name, "train/loss") for name in ("run", "alone"))
    assert here == [pytest.approx(step, rel=1e-4) for step in alone]


@pytest.mark.gate
def test_torchrun_per_node_gives_the_same_and_passes_a_notice_on(
    cluster: Cluster, worlds: Worlds, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, *LONG, MEGARL_LAUNCH="torchrun")
    job.rank(1, lambda heartbeat: heartbeat.step >= 3)
    cluster.run("scancel", "--signal=USR1", job.number)
    worlds.run(2, run_sft, tmp_path / "unbroken", *TINY, *LONG)
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1", f"no requeue: {job.log()}", PATIENCE_S)
    assert job.ends("COMPLETED", "FAILED") == "COMPLETED", job.log()
    assert job.steps() == list(range(1, 301))
    assert_same_bits(final_tensors(job.run_dir), final_tensors(tmp_path / "unbroken"))


@pytest.mark.gate
def test_a_killed_rank_ends_the_others_and_the_run_goes_on_from_its_checkpoint(
    cluster: Cluster, worlds: Worlds, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, *LONG)
    first = job.rank(1, lambda heartbeat: 102 <= heartbeat.step < 200)
    os.kill(first.pid, signal.SIGKILL)
    job.rank(1, lambda heartbeat: heartbeat.pid != first.pid and heartbeat.step >= 101)
    worlds.run(2, run_sft, tmp_path / "unbroken", *TINY, *LONG)
    assert job.ends("COMPLETED", "FAILED") == "COMPLETED", job.log()
    assert "starting again from the newest checkpoint (1 of 3)" in job.log()
    assert cluster.job(job.number)["Restarts"] == "0", "it kept its nodes"
    assert_same_bits(final_tensors(job.run_dir), final_tensors(tmp_path / "unbroken"))


@pytest.mark.gate
def test_a_stopped_rank_ends_the_job_at_its_time_out_and_is_named(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, *LONG, "parallel.timeout_s=20", MEGARL_RESTARTS="0")
    stopped = job.rank(1, lambda heartbeat: heartbeat.step >= 3)
    os.kill(stopped.pid, signal.SIGSTOP)
    cluster.wait(lambda: job.state() not in ("RUNNING", "COMPLETING"), f"it hangs: {job.log()}", 120)
    assert job.state() == "FAILED"
    said = cluster.run("bash", "-c", f"{sys.executable} -m megarl.why_stuck {job.run_dir} || true", cwd=ROOT)
    assert "rank 1 (" in said.splitlines()[-1] or "rank 0 (" in said.splitlines()[-1]


@pytest.mark.gate
def test_the_time_limit_leads_to_a_requeue_and_the_run_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    options = (*TWO, "--time=3", "--signal=USR1@60")
    job = Job(cluster, tmp_path, "trainer.max_steps=1000000", "checkpoint.every=null", options=options)
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == "1", f"no requeue: {job.log()}", 2 * PATIENCE_S)
    assert "SIGUSR1: saving and stopping" in job.log()
    (saved,) = [path.name for path in (job.run_dir / "checkpoints").glob("step-*")]
    reached = int(saved.removeprefix("step-"))
    job.rank(0, lambda heartbeat: heartbeat.step > reached)
    cluster.run("scancel", job.number)
    job.ends("CANCELLED")
    steps = job.steps()
    assert steps == list(range(1, len(steps) + 1)), "it went on with the next step"


@pytest.mark.gate
def test_a_chain_goes_on_where_requeueing_is_forbidden(cluster: Cluster, worlds: Worlds, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [*TWO, f"--output={tmp_path}/job-%j.log", SFT, *TINY, f"run.dir={run_dir}", *LONG]
    first, second = cluster.run(ROOT / "launchers" / "chain.sh", "2", *command, cwd=tmp_path, **THREADS).split()
    assert f"afterany:{first}" in cluster.job(second)["Dependency"]
    cluster.wait(lambda: any(heartbeat.step >= 3 for heartbeat in read(run_dir)), "it never trained", PATIENCE_S)
    cluster.run("scancel", "--signal=USR1", first)
    worlds.run(2, run_sft, tmp_path / "unbroken", *TINY, *LONG)
    assert cluster.wait_for(first, ("FAILED", "COMPLETED"), PATIENCE_S, logs=tmp_path) == "FAILED"
    assert cluster.job(first)["ExitCode"] == "75:0"
    assert cluster.wait_for(second, ("FAILED", "COMPLETED"), PATIENCE_S, logs=tmp_path) == "COMPLETED"
    assert_same_bits(final_tensors(run_dir), final_tensors(tmp_path / "unbroken"))
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"


PAIRS = int(os.environ.get("MEGARL_GATE_PAIRS", "1"))


def test_of_two_jobs_in_one_folder_one_trains(cluster: Cluster, tmp_path: Path) -> None:
    """One on each node, within a second."""
    endless = ("trainer.max_steps=1000000", "checkpoint.every=10")
    for pair in range(PAIRS):
        one = ("--nodes=1", "--ntasks-per-node=1")
        folder = tmp_path / str(pair)
        jobs = []
        for node in ("n1", "n2"):
            (folder / node).mkdir(parents=True)
            options = (*one, f"--nodelist={node}", f"--output={folder}/{node}/job.log")
            command = [*options, SFT, *TINY, f"run.dir={folder}/run", *endless]
            jobs.append(cluster.submit(*command, cwd=folder / node, **THREADS))

        def ended(job: str) -> bool:
            return cluster.state(job) in ("FAILED", "COMPLETED")

        cluster.wait(lambda jobs=jobs, ended=ended: any(ended(job) for job in jobs), "nobody ended", PATIENCE_S)
        refused, owner = sorted(jobs, key=ended, reverse=True)
        assert cluster.job(refused)["ExitCode"] == "2:0"
        logs = {job: (folder / node / "job.log").read_text() for job, node in zip(jobs, ("n1", "n2"), strict=True)}
        assert "is in use by process" in logs[refused]
        cluster.wait(
            lambda folder=folder: any(heartbeat.step >= 3 for heartbeat in read(folder / "run")), "no step", PATIENCE_S
        )
        assert cluster.state(owner) == "RUNNING"
        assert "is in use" not in (folder / "run" / "console" / owner / "rank-0000.log").read_text()
        cluster.run("scancel", owner)
        cluster.wait_for(owner, ("CANCELLED",), PATIENCE_S)


def test_a_refused_srun_of_two_tasks_ends(cluster: Cluster, tmp_path: Path) -> None:
    """srun itself would leave the other task waiting for the first."""
    holder = RunLock(tmp_path / "run")
    holder.take()
    command = [sys.executable, "-m", "megarl.train_sft", *TINY, f"run.dir={tmp_path}/run"]
    started = ["srun", *TWO, *command]
    environ = {**cluster.environ, **THREADS, "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(started, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    holder.release()
    assert_command_refused(done, f"run.dir={tmp_path}/run", f"process {os.getpid()}")
