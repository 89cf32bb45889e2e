"""The conformance suite passes as a whole, and finds faults that are planted in a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megarl.conformance.features import cases
from tests.gates.environments import ROOT
from tests.report.parsed import parse

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]


@dataclass(frozen=True)
class Fault:
    """A mistake in the source.

    Attributes:
        file: the file of the package.
        right, wrong: what is there, and what takes its place.
        only: features whose cases are run.
        fails: the cases that must fail, and no other.
        says: words of the line that says how.
    """

    file: str
    right: str
    wrong: str
    only: str
    fails: tuple[str, ...]
    says: tuple[str, ...]


FAULTS = {
    "a norm is counted twice under TP": Fault(
        file="parallel/optimizer.py",
        right="        _allocate_state(part)\n    return optimizer\n",
        wrong=(
            "        _allocate_state(part)\n"
            "        part.get_main_grads_for_grad_norm = lambda part=part: [p.grad for p in part.get_parameters()]\n"
            "    return optimizer\n"
        ),
        only="tp,cut",
        fails=("tp", "tp+cut"),
        says=("gradient norm",),
    ),
    "a slice of CP lacks its causal edge": Fault(
        file="models/sliced_attention.py",
        right="(k[:, :, past:], v[:, :, past:], True)",
        wrong="(k[:, :, past:], v[:, :, past:], False)",
        only="cp,cut",
        fails=("cp", "cp+cut"),
        says=("log-probs",),
    ),
    "a loss depends on its microbatch": Fault(
        file="modules/losses.py",
        right='denominator=counts["tokens"]',
        wrong="denominator=None",
        only="recompute,cut",
        fails=("cut", "recompute+cut"),
        says=("sft", "loss"),
    ),
    "an expert's gradient is summed over the wrong group": Fault(
        file="models/experts.py",
        right="parameter.allreduce = False",
        wrong="parameter.allreduce = True",
        only="ep,dp",
        fails=("ep", "dp+ep"),
        says=("gradients, first step", "experts.local_experts"),
    ),
    "filler rows keep their mask": Fault(
        file="parallel/microbatches.py",
        right="action_mask=torch.zeros_like(rows.action_mask))",
        wrong="action_mask=rows.action_mask)",
        only="dp,recompute",
        fails=("dp", "dp+recompute"),
        says=("ppo", "loss"),
    ),
    "the second copy of a tied embedding stays as it was": Fault(
        file="parallel/engine.py",
        right="        _, norm, _ = optimizer.step()\n",
        wrong=(
            "        stale = [\n"
            "            (parameter, parameter.detach().clone())\n"
            "            for name, parameter in self.parameters()\n"
            "            if name.startswith('embedding.word') and not self.grid.is_first_stage\n"
            "        ]\n"
            "        _, norm, _ = optimizer.step()\n"
            "        for parameter, before in stale:\n"
            "            parameter.data.copy_(before)\n"
        ),
        only="pp,tied",
        fails=("pp+tied",),
        says=("parameters", "copy 2 of 2"),
    ),
}


def suite(root: Path, *words: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    """Run the suite of the package in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "megarl.selftest", "--all", "limit=600", *words]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3000)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "megarl", folder / "megarl", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name: str, untouched: Path, tmp_path: Path) -> None:
    fault = FAULTS[name]
    shutil.copytree(untouched / "megarl", tmp_path / "megarl")
    file = tmp_path / "megarl" / fault.file
    if not file.exists():
        pytest.skip(f"there is no {fault.file}")
    source = file.read_text()
    assert source.count(fault.right) == 1, f"{fault.file} has changed: plant the fault in another place"
    file.write_text(source.replace(fault.right, fault.wrong))
    done = suite(tmp_path, f"only={fault.only}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert tuple(line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAIL ")) == fault.fails
    lines = [line for line in done.stdout.splitlines() if "differ by" in line]
    assert any(all(word in line for word in fault.says) for line in lines), done.stdout


def test_without_a_fault_the_whole_suite_passes(untouched: Path, tmp_path: Path) -> None:
    done = suite(untouched, f"html={tmp_path / 'suite.html'}")
    assert done.returncode == 0, done.stdout + done.stderr
    table = parse((tmp_path / "suite.html").read_text()).all(id="pairs")[0]
    states = [cell.text() for cell in table.all("a")]
    assert len(states) == len(list(cases()))
    assert set(states) <= {"ok", "refused"}
    assert states.count("ok") >= 78


def test_a_launchers_processes_train_the_cases_that_fit(untouched: Path) -> None:
    """Two processes: pipelines and tensor parallelism fit, both together do not, and replicas fill the rest."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = suite(untouched, "only=tp,pp,freeze", launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused ")]
    assert [line.partition(":")[0] for line in refused] == ["refused tp+pp"]
    assert "5 of 6 cases" in done.stdout
