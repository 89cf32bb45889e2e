"""A run is read from its folder while it runs, and whatever is broken in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.errors import DataError
from megarl.report.data import read_run
from megarl.report.scores import MOST_PHASES, quantile, read_scores
from tests.report.made_up import SUMMARY, made_up, trace, write_run, write_scores


def test_a_run_is_read_as_it_was_logged(tmp_path: Path) -> None:
    run = made_up(5)
    found = read_run(write_run(tmp_path, run))
    assert (found.rows, found.config, found.samples) == (run.rows, run.config, run.samples)
    assert (found.entry, found.versions, found.git) == ("ppo", run.versions, run.git)


def test_what_is_half_written_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, made_up(3))
    for name, half in (("metrics.csv", "4,0.1,0."), ("samples.jsonl", '{"phase": 30, "pro'), ("summary.json", "x")):
        with (tmp_path / name).open("a") as file:
            file.write(half)
    found = read_run(tmp_path)
    assert [row["step"] for row in found.rows] == [1, 2, 3]
    assert max(row["phase"] for row in found.samples) == 20
    assert found.summary == {}


def test_lines_of_the_table_that_have_no_step_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n1,2,9,9\n,3\nnan,4\n2,\n")
    assert [dict(row) for row in read_run(tmp_path).rows] == [{"step": 1.0, "a": 2.0}, {"step": 2.0}]


def test_steps_are_in_their_order_however_the_table_has_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n3,1\n1,2\n2,3\n2,4\n")
    assert read_run(tmp_path).series("a") == [(1, 2), (2, 3), (2, 4), (3, 1)]


@pytest.mark.parametrize("content", ["step,a\n1,x\n", b"\xff\xfe\n"])
def test_a_table_that_is_none_is_refused_by_its_path(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as raised:
        read_run(tmp_path)
    assert raised.value.where == str(path)


def test_steps_without_a_finite_value_are_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n1,nan\n2,1.5\n3,inf\n")
    run = read_run(tmp_path)
    assert (run.series("a"), run.not_finite("a")) == ([(2, 1.5)], [1, 3])


def test_scores_are_those_of_the_journal_without_lines_that_are_none(tmp_path: Path) -> None:
    write_scores(tmp_path / "journal", {2: [0.5, 1.0], 3: []})
    lines = [
        '{"of": "9-0-a", "score": [0.25, 0.5]}',
        '{"of": "10", "score": null}',
        '{"of": "11", "score": "x"}',
        '{"of"',
    ]
    with (tmp_path / "journal" / "reward-train-000002.jsonl").open("a") as file:
        file.write("\n".join(lines))
    (tmp_path / "journal" / "reward-eval-000002.jsonl").write_text('{"of": "a", "score": 7}\n')
    assert read_scores(made_up(path=tmp_path)) == [(2, [0.5, 1.0, 0.75])]


def test_a_dump_of_rollouts_has_the_scores_of_all_phases(tmp_path: Path) -> None:
    write_scores(tmp_path / "journal", {7: [1.0]})
    write_scores(tmp_path / "dump", {phase: [float(phase)] for phase in range(200)})
    config = {"rollout": {"dump": str(tmp_path / "dump")}}
    phases = [phase for phase, _ in read_scores(made_up(path=tmp_path, config=config))]
    assert len(phases) == MOST_PHASES
    assert (phases[0], phases[-1]) == (0, 199)


def test_quantiles_lie_between_neighbours() -> None:
    assert [quantile([0.0, 1.0, 3.0], share) for share in (0, 0.25, 0.5, 0.75, 1)] == [0.0, 0.5, 1.0, 2.0, 3.0]
    assert quantile([2.0], 0.75) == 2.0


def test_what_an_abandoned_attempt_left_beyond_the_last_step_of_an_ended_run_is_not_read(tmp_path: Path) -> None:
    """A run that came to 20, was resumed from 5 and ended at 10."""
    left = made_up(20, samples=[{"phase": phase, "prompt": "a", "response": str(phase)} for phase in (0, 10, 20)])
    folder = write_run(tmp_path / "run", replace(left, traces=[{"phase": phase, **trace()} for phase in (1, 10, 20)]))
    for status, last in (("running", 20), ("finished", 10)):
        (folder / "summary.json").write_text(json.dumps({**SUMMARY, "status": status, "steps": 10}))
        run = read_run(folder)
        assert run.rows[-1]["step"] == last
        assert [row["phase"] for row in run.samples][-1] == last
        assert [row["phase"] for row in run.traces][-1] == last


@pytest.mark.parametrize("content", ["a: 2020-13-45", "a: !!int x", "a: [", "- 1", "\0"])
def test_a_damaged_configuration_counts_as_empty(content: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_up(3))
    (folder / "config.yaml").write_text(content)
    assert read_run(folder).config == {}
