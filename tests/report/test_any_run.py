"""Whatever numbers a run has logged, looking for findings ends without an error and says what can be shown."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from megarl.report.data import RunData
from megarl.report.findings import FINDERS, as_plain, find, line
from tests.report.keep import COLUMNS, SETTINGS, kept, read_index

EVALUATED = ("eval/score", "eval/score_se", "eval/loss", "eval/accuracy", "eval/optimality", "eval/exact")
USUAL = (0.0, 1.0, 0.5, -0.5, 1e-3, 30.0, 1e4)
STRANGE = (*USUAL, math.nan, math.inf, -math.inf, 1e300, -1e300, 1.7e308, -1.7e308, 5e-324, -1.0)
ANSWERS = (None, 0, -1, 1, 8, 0.5, "", "8", "fp32", "bf16", "min", "eval/score", True, [], {}, [1], {"a": 1}, 10**400)
LENGTHS = (0, 1, 2, 3, 5, 9, 10, 12, 30)


def any_series(chance: random.Random, length: int) -> list[float]:
    """Numbers at random, a constant, or a slope, in parts."""
    values: list[float] = []
    pool = chance.choice((USUAL, STRANGE))
    while len(values) < length:
        part, start, slope = chance.randint(1, length), chance.choice(pool), chance.choice((0.0, 0.0, 0.1, -0.1, 2.0))
        values += [chance.choice(pool) if slope == 2.0 else start * (1 + slope * i) for i in range(part)]
    return values[:length]


def any_run(seed: int) -> RunData:
    chance = random.Random(seed)
    length = chance.choice(LENGTHS)
    names = [name for name in (*COLUMNS, *EVALUATED) if chance.random() < 0.7]
    series = {name: any_series(chance, length) for name in names}
    gaps = chance.choice((0.0, 0.0, 0.5))
    steps = sorted((index + 1) * chance.choice((1, 1, 1, 10)) for index in range(length))  # some of them twice
    rows = [
        {"step": float(step), **{name: series[name][index] for name in names if chance.random() >= gaps}}
        for index, step in enumerate(steps)
    ]
    config: dict[str, Any] = {}
    for key in (*SETTINGS, "optim.clip_grad", "rollout.replay", "ppo.correction"):
        if chance.random() < 0.6:
            *sections, name = key.split(".")
            holder = config
            for section in sections:
                if not isinstance(holder.get(section), dict):
                    holder[section] = chance.choice((None, 3)) if chance.random() < 0.03 else {}
                if not isinstance(holder[section], dict):
                    break
                holder = holder[section]
            else:
                holder[name] = chance.choice(ANSWERS)
    summary = {
        "rows": chance.choice(
            (None, 3, {}, {"read": 900, "there": 90}, {"read": chance.choice(ANSWERS), "there": chance.choice(ANSWERS)})
        ),
        "seconds": chance.choice((None, "x", {"score": chance.choice((900.0, *ANSWERS)), "train": {"wall_s": "x"}})),
    }
    samples = [
        {"response": chance.choice(("a" * index, None)), "score": chance.choice((*STRANGE, None, "1", True))}
        for index in range(chance.choice((0, 3, 40)))
    ]
    return RunData(Path("any"), config, rows, summary, samples)


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_whatever_was_logged_is_looked_at_without_an_error(first: int) -> None:
    for seed in range(first, first + 500):
        run = any_run(seed)
        steps = [row["step"] for row in run.rows]
        for finding in find(run):
            said = f"seed {seed}: {finding}"
            assert finding.evidence.endswith("."), said
            assert re.search(r"\b(nan|None)\b", f"{finding.evidence} {finding.remedy}") is None, said
            assert "\n" not in line(finding), said
            json.dumps(as_plain([finding]), allow_nan=False)
            if finding.steps is not None:
                assert min(steps) <= finding.steps[0] <= finding.steps[1] <= max(steps), said


def test_the_runs_at_random_have_every_finding_somewhere() -> None:
    """Otherwise the test above would not look at it."""
    assert {finding.name for seed in range(1000) for finding in find(any_run(seed))} == set(FINDERS)


def test_a_long_run_is_looked_at_as_well() -> None:
    chance = random.Random(1)
    metrics = (*COLUMNS, *EVALUATED)
    rows = [{"step": float(step), **{name: chance.random() for name in metrics}} for step in range(1, 10_001)]
    found = find(RunData(Path("long"), {"trainer": {"max_phases": 10_000}}, rows))
    assert "clipping_always" in {finding.name for finding in found}


@pytest.mark.parametrize("name", read_index())
def test_a_reward_that_is_a_thousand_times_as_large_has_the_same_findings(name: str) -> None:
    run = kept(name)
    scaled = ("rollout/score", "rollout/score_std", "rollout/score_before_replacing", "eval/score", "eval/optimality")
    factors = {**dict.fromkeys(scaled, 1024.0), "value/loss": 1024.0**2}
    rows = [{metric: value * factors.get(metric, 1.0) for metric, value in row.items()} for row in run.rows]
    larger = RunData(run.path, run.config, rows, run.summary, run.samples)
    assert [finding.name for finding in find(larger)] == [finding.name for finding in find(run)]
