"""The small tasks with three seeds each. randomwalks: PPO and ILQL on every learnable graph from 1000 to 1020, A2C and
NLPO on five of them, the algorithms without a critic on three. arithmetic: PPO, GRPO and every preset of an algorithm.

Results that benchmarks/results/sweeps.jsonl has are not made again: this holds what was measured to what is promised.
What a change of the code does is seen by the fresh runs of test_ppo_randomwalks and test_randomwalks_ilql.
"""

import shutil
from pathlib import Path

import pytest

from benchmarks.curves import FOLDER, algorithm, curves
from benchmarks.sweeps import PRESETS, RESULTS, SWEEPS, Case, known, run_missing, settled

pytestmark = [pytest.mark.gate, pytest.mark.timeout(6 * 3600)]
CASES = {"ppo": 42, "ilql": 42, "grpo": 18, "on_policy": 48}
LEAST = {"ppo": (0.95, 0.85), "ilql": (0.92, 0.75), "grpo": (0.9, 0.75), "on_policy": (0.9, 0.8)}
"""Of the last five evaluations: the mean over all runs, and the worst run."""
LEVEL = 0.75  # score on held-out sums at the end of every run of arithmetic


@pytest.mark.parametrize("sweep", LEAST)
def test_short_paths_are_found_on_every_learnable_graph(sweep: str, tmp_path: Path) -> None:
    ends = {name: settled(series) for name, series in finished(list(SWEEPS[sweep]()), tmp_path).items()}
    assert len(ends) == CASES[sweep]
    mean, worst = LEAST[sweep]
    assert sum(ends.values()) / len(ends) >= mean
    assert {name: end for name, end in ends.items() if end < worst} == {}


@pytest.mark.parametrize("name", ["ppo", "grpo", *PRESETS])
def test_sums_are_learned_by_every_algorithm(name: str, tmp_path: Path) -> None:
    cases = [case for case in SWEEPS["arithmetic"]() if algorithm(case) == name]
    assert len(cases) == 3
    for run, series in finished(cases, tmp_path).items():
        assert series[-1] >= LEVEL > series[0], run


def test_the_curves_of_the_pages_are_those_of_the_results() -> None:
    assert {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")} == curves()


def finished(cases: list[Case], folder: Path) -> dict[str, list[float]]:
    """The series of every case by its name, after running those that have no results yet."""
    results = Path(shutil.copy(RESULTS, folder))
    run_missing(cases, results)
    lines = known(results)
    return {" ".join(case.overrides): lines[case.fingerprint()]["series"][case.metric] for case in cases}
