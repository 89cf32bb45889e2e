"""Data that cannot be read ends a run of several processes in one line."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from megarl.errors import MegarlError
from tests.e2e.runs import run_ilql, run_ppo, run_sft
from tests.refusals import assert_refusal
from tests.worlds import Worlds


def ended(run: Callable[..., None], run_dir: Path, *overrides: str) -> tuple[MegarlError | None, list[str]]:
    """A rank's error, and the lines on stderr that say it."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            run(run_dir, *overrides)
    except MegarlError as problem:
        return problem, [line for line in errors.getvalue().splitlines() if "error:" in line]
    return None, []


@pytest.mark.parametrize(("run", "key"), [(run_sft, "data.train"), (run_ilql, "data.train"), (run_ppo, "clone.data")])
def test_a_broken_record_is_one_line_of_all_processes(
    run: Callable[..., None], key: str, worlds: Worlds, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": 1, "samples": 1, "rewards": 1}\n')
    batch = ["trainer.global_batch_size=12", "trainer.micro_batch_size=2"]
    first, second = worlds.run(2, ended, run, tmp_path / "run", f"{key}=[{broken}]", *batch)
    error, shown = first
    assert_refusal(error, names=(f"{broken}:1",))
    assert error.said
    assert len(shown) == 1
    assert (str(second[0]), second[0].said, second[1]) == (str(error), True, [])
