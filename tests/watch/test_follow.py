"""Following the files of a run: whatever a writer does, what is read is what the file has."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megarl.report.data import read_run
from megarl.run.csv_logger import MetricsFile
from megarl.watch import follow
from megarl.watch.follow import MetricsTable, RunFollower
from tests.report.made_up import made_up, write_run, write_scores


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def check(table: MetricsTable, path: Path) -> None:
    """The table has what a fresh reader of the file would have."""
    assert sorted(table.rows, key=lambda row: row["step"]) == read_run(path.parent).rows


# --- metrics.csv ------------------------------------------------------------------------------------------------------


def test_whatever_the_runs_logger_does_the_rows_are_those_of_the_file(file: Path) -> None:
    table = MetricsTable(file)
    assert not table.poll()  # there is no file yet
    logger = MetricsFile(file)
    for metrics, step in [
        ({"train/loss": 3.0}, 1),
        ({"train/loss": 2.0}, 2),
        ({"eval/loss": 2.5}, 2),  # a new column: the file is replaced
        ({"train/loss": 1.0}, 3),
        ({"eval/loss": 1.5}, 3),  # the last row is written again
        ({"train/loss": 0.5}, 4),
    ]:
        logger.log_metrics(metrics, step)
        assert table.poll()
        check(table, file)
        assert not table.poll()
    resumed = MetricsFile(file)
    for step in (2, 3, 4, 5):  # a resume from an earlier checkpoint replaces rows, then appends
        resumed.log_metrics({"train/loss": step / 64}, step)
        assert table.poll()
        check(table, file)


def test_only_the_metrics_that_differ_count_as_changed(file: Path) -> None:
    logger, table = MetricsFile(file), MetricsTable(file)
    logger.log_metrics({"a": 1.0, "b": 1.0}, 1)
    table.poll()
    assert table.changed == {"step": 1, "a": 1, "b": 1}
    logger.log_metrics({"a": 2.0}, 2)
    table.poll()
    assert table.changed == {"step": 2, "a": 2, "b": 1}
    logger.log_metrics({"c": 2.0}, 2)  # the whole file is read again, and a and b are what they were
    table.poll()
    assert table.changed == {"step": 2, "a": 2, "b": 1, "c": 3}


def test_a_line_without_an_end_is_not_read_until_it_has_one(file: Path) -> None:
    file.write_text("step,a\n1,1.0\n2,1")
    table = MetricsTable(file)
    table.poll()
    assert table.rows == [{"step": 1, "a": 1}]
    with file.open("a") as end:
        end.write("5.5")
    assert not table.poll()
    with file.open("a") as end:
        end.write("\n")
    assert table.poll()
    assert table.rows[1:] == [{"step": 2, "a": 15.5}]


def test_a_header_without_an_end_and_an_empty_file_have_no_rows(file: Path) -> None:
    table = MetricsTable(file)
    for text in ("", "st", "step,a", "step,a\n"):
        file.write_text(text)
        table.poll()
        assert (table.rows, table.problem) == ([], None)
    file.write_text("step,a\n1,2\n")
    assert table.poll()
    check(table, file)


@pytest.mark.parametrize(
    "later",
    [
        "step,a,b\n1,1.0,1.0\n2,2.0,1.0\n3,3.0,1.0\n",  # other columns
        "step,b\n1,1.0\n2,2.0\n3,3.0\n",
        "step,a\n1,1.0\n",  # shorter
        "step,a\n",
        "step,a\n9,9.0\n8,1.0\n7,3.0\n",
    ],
)
def test_a_file_that_another_logger_writes_anew_is_read_anew(file: Path, later: str) -> None:
    file.write_text("step,a\n1,1.0\n2,2.0\n3,3.0\n")
    table = MetricsTable(file)
    table.poll()
    file.write_text(later)
    assert table.poll()
    check(table, file)


def test_an_earlier_row_that_is_changed_in_place_is_seen_at_the_next_checksum(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    file.write_text("step,a\n1,1.0\n2,2.0\n3,3.0\n")
    table = MetricsTable(file)
    table.poll()
    file.write_text("step,a\n1,7.0\n2,2.0\n3,3.5\n")
    table.poll()
    assert [row["a"] for row in table.rows] == [1.0, 2.0, 3.5]
    now[0] += 31
    assert table.poll()
    check(table, file)
    now[0] += 31
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("nothing has changed since"))
    assert not table.poll()


def test_what_is_appended_is_read_without_what_comes_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("step,a\n" + "".join(f"{step},{step}.0\n" for step in range(10_000)))
    table = MetricsTable(file)
    table.poll()
    with file.open("a") as end:
        end.write("10000,1.0\n")
    pread, read = os.pread, []

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        read.append(len(found := pread(descriptor, size, offset)))
        return found

    monkeypatch.setattr(os, "pread", counted)
    assert table.poll()
    check(table, file)
    assert 0 < sum(read) < 100


@pytest.mark.parametrize("damage", [b"4,seven\n", b"4,\xff\n"])
def test_a_file_that_is_no_table_leaves_the_rows_and_says_why(file: Path, damage: bytes) -> None:
    good = b"step,a\n1,1.0\n2,2.0\n3,3.0\n"
    file.write_bytes(good)
    table = MetricsTable(file)
    table.poll()
    rows = table.rows
    for content in (good + damage, damage + good + damage):
        file.write_bytes(content)
        assert table.poll()
        assert table.rows == rows
        assert table.problem is not None
        assert "metrics.csv cannot be read" in table.problem
        assert not table.poll()  # and does not forget it
        assert table.problem
        file.write_bytes(good)
        assert table.poll()
        assert (table.rows, table.problem) == (rows, None)


def test_a_reading_that_fails_is_tried_again_though_the_file_is_the_same(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    file.write_text("step,a\n1,1.0\n")
    table = MetricsTable(file)
    table.poll()
    file.write_text("step,a\n1,1.0\n2,2.0\n")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", fail)
        assert table.poll()
        assert "Input/output error" in str(table.problem)
        assert not table.poll()
    assert table.poll()
    assert table.problem is None
    check(table, file)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_every_file_of_a_run_is_followed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_up(3, samples=[], summary={}))
    follower = RunFollower(folder)
    assert follower.poll()
    assert not follower.poll()
    (folder / "summary.json").write_text(json.dumps({"status": "running", "algorithm": "ppo"}))
    assert follower.poll()
    assert (follower.data.summary["status"], follower.data.entry) == ("running", "ppo")
    (folder / "samples.jsonl").write_text('{"phase": 1, "prompt": "a", "response": "b"}\n')
    assert follower.poll()
    assert follower.data.samples[0]["response"] == "b"
    for change in (
        lambda: (folder / "findings.json").write_text("{}"),
        lambda: write_scores(folder / "journal", {0: [1.0]}),
        lambda: write_scores(folder / "journal", {1: [1.0]}),
    ):
        change()
        assert follower.poll()
        assert not follower.poll()


def test_a_folder_that_is_deleted_leaves_what_was_read_and_may_come_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_up(3))
    follower = RunFollower(folder)
    follower.poll()
    before = follower.data
    (folder / "metrics.csv").unlink()
    assert follower.poll()
    assert "metrics.csv is gone" in str(follower.problem)
    shutil.rmtree(folder)
    assert follower.poll()
    assert "folder is gone" in str(follower.problem)
    assert not follower.poll()
    assert follower.data == before
    write_run(folder, made_up(5, config={}))
    assert follower.poll()
    assert (follower.problem, len(follower.data.rows), follower.data.config) == (None, 5, {})


def test_a_run_that_has_not_logged_yet_is_followed_into_its_first_row(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    follower = RunFollower(tmp_path)
    assert not follower.poll()
    assert (follower.data.rows, follower.problem) == ([], None)
    MetricsFile(tmp_path / "metrics.csv").log_metrics({"a": 1.0}, 1)
    assert follower.poll()
    assert follower.data.rows == [{"step": 1, "a": 1}]
