"""The table of benchmarks/experts.py comes out, at a shape so small that its times mean nothing."""

import contextlib
import io

import pytest

from benchmarks import experts
from megarl.parallel.cpu import needed
from tests.worlds import Worlds

pytestmark = pytest.mark.skipif(not needed(), reason="the CPU table is made on machines without a GPU")


def printed(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = experts.main(arguments)
    return code, out.getvalue().splitlines()


def test_losses_agree_with_transformers_and_all_are_timed(worlds: Worlds) -> None:
    ((code, lines),) = worlds.run(1, printed, ["--cases", "tiny", "--seconds", "0"])
    assert code == 0
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[1] for row in table] == ["beside", table[1][1], "transformers' Qwen3Moe", "a dense model of ours"]
    assert all(float(cell) > 0 for row in table[2:] for cell in row[4:])
