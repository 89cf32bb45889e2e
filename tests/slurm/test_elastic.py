"""A job that loses a node goes on with those that are left, and with all of them once the node is back, on a real Slurm
of three nodes: the same numbers as in a run that nothing happened to."""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.e2e.runs import final_tensors, metrics, run_sft, starts
from tests.slurm.cluster import Cluster
from tests.slurm.test_launchers import LONG, PATIENCE_S, TINY, Job
from tests.worlds import Worlds

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
TWO_OR_THREE = ("--nodes=2-3",)  # with --ntasks-per-node=1 sbatch would ask for two tasks, and so for two nodes
BATCH = ["trainer.global_batch_size=12", "trainer.micro_batch_size=4"]  # 4 divides a third of the batch, not a half


def requeued(cluster: Cluster, job: Job, times: int) -> None:
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] == str(times), f"no requeue: {job.log()}", PATIENCE_S)


def test_a_job_goes_on_with_the_nodes_that_are_left_and_with_those_that_come_back(
    three_nodes: Cluster, worlds: Worlds, tmp_path: Path
) -> None:
    job = Job(three_nodes, tmp_path, *LONG, *BATCH, "launch.elastic=true", options=TWO_OR_THREE)
    job.rank(2, lambda heartbeat: heartbeat.world == 3 and 102 <= heartbeat.step < 200)
    three_nodes.kill_node("n3")
    requeued(three_nodes, job, 1)
    pids = [
        job.rank(rank, lambda heartbeat: heartbeat.world == 2 and 102 <= heartbeat.step < 250).pid for rank in (0, 1)
    ]
    for pid in pids:  # the run waits until the node is back
        os.kill(pid, signal.SIGSTOP)
    three_nodes.return_node("n3")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    three_nodes.run("scancel", "--signal=USR1", job.number)
    requeued(three_nodes, job, 2)
    assert job.ends("COMPLETED", "FAILED") == "COMPLETED", job.log()

    found = [(start["restart"], start["layout"], start["micro_batch_size"]) for start in starts(job.run_dir)]
    assert [one for one in found if one[0] != 0] == [(1, "DP2", 3), (2, "DP3", 4)]
    assert found[0] == (0, "DP3", 4)
    assert "launch.elastic: trainer.micro_batch_size=4 " in job.log()
    worlds.run(3, run_sft, tmp_path / "unbroken", *TINY, *LONG, *BATCH)
    assert job.steps() == list(range(1, 301)), "no step is missing or done twice"
    names = ("train/loss", "train/grad_norm")
    for ours, theirs in zip(metrics(job.run_dir, *names), metrics(tmp_path / "unbroken", *names), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    here, unbroken = final_tensors(job.run_dir), final_tensors(tmp_path / "unbroken")
    for name, tensor in unbroken.items():
        torch.testing.assert_close(here[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_node_that_no_layout_can_use_stays_idle(three_nodes: Cluster, tmp_path: Path) -> None:
    """Three replicas do not divide a batch of eight."""
    overrides = ["trainer.max_steps=2", "trainer.global_batch_size=8", "launch.elastic=true"]
    job = Job(three_nodes, tmp_path, *overrides, options=("--nodes=3",))
    assert job.ends("COMPLETED", "FAILED") == "COMPLETED", job.log()
    assert "2 of the 3 nodes are used" in job.log()
    assert [start["layout"] for start in starts(job.run_dir)] == ["DP2"]
    assert job.steps() == [1, 2]
