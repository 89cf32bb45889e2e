"""The randomwalks task on every learnable graph from 1000 to 1020 with three seeds each, PPO and ILQL.

Runs whose results benchmarks/results/sweeps.jsonl has already are not made again; `python -m benchmarks.sweeps run ppo`
makes them one by one on any machine.
"""

import pytest

from benchmarks.sweeps import RESULTS, SWEEPS, known, run_missing, settled

pytestmark = [pytest.mark.gate, pytest.mark.timeout(6 * 3600)]
LEAST = {"ppo": (0.95, 0.85), "ilql": (0.92, 0.75)}
"""Of the last five evaluations: the mean over all runs, and the worst run."""


@pytest.mark.parametrize("sweep", LEAST)
def test_short_paths_are_found_on_every_learnable_graph(sweep: str) -> None:
    cases = list(SWEEPS[sweep]())
    assert len(cases) == 42
    run_missing(cases, RESULTS)
    finished = known(RESULTS)
    ends = {" ".join(case.settings): settled(finished[case.fingerprint()]["series"][case.metric]) for case in cases}
    mean, worst = LEAST[sweep]
    assert sum(ends.values()) / len(ends) >= mean
    assert {name: end for name, end in ends.items() if end < worst} == {}
