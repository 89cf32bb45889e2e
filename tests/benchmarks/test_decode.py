"""The table of benchmarks/decode.py comes out on a CPU, at a shape so small that its times mean nothing."""

import contextlib
import io

import pytest

from benchmarks import decode
from benchmarks.train_step import live_grid
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.roles import Role
from megarl.parallel.cpu import needed
from megarl.parallel.grid import start_world
from tests.worlds import Worlds

pytestmark = pytest.mark.skipif(not needed(), reason="tried on machines without a GPU")


def printed(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = decode.main(arguments)
    return code, out.getvalue().splitlines()


def test_each_batch_has_a_line_with_graphs_and_one_without(worlds: Worlds) -> None:
    quick = ["--device", "cpu", "--shapes", "tiny", "--prompt", "3", "--new", "5", "--repeats", "1", "--copy-mib", "1"]
    ((code, lines),) = worlds.run(1, printed, [*quick, "--batches", "1", "2"])
    assert code == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    assert [(row[1], row[2], row[3]) for row in rows] == [
        ("1", "3 + 5", "no"),
        ("1", "3 + 5", "yes"),
        ("2", "3 + 5", "no"),
        ("2", "3 + 5", "yes"),
    ]
    assert {row[-1] for row in rows} == {"-"}  # no GPU's memory is stated that was not measured


def read_bytes(rows: int) -> float:
    shape = decode.SHAPES["tiny"]
    with live_grid(start_world()) as grid:
        engine = build_engine(
            Role("policy", shape.model, shape.vocab_size), grid, ParallelConfig(), precision="bf16", seed=1
        )
        return decode.bound_seconds(engine, shape, rows, prompt=3, new=3, bandwidth=1.0)


def test_the_bound_reads_weights_and_cache_once_a_step(worlds: Worlds) -> None:
    """2 layers of 64, two of four key-value heads of 16, a gated layer of 128, norms, and an output of 128 words."""
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    weights = 2 * layer + 64 + 64 * 128
    cache = [(3 + step) * 2 * 2 * 2 * 16 for step in (1, 2)]
    for rows in (1, 5):
        assert worlds.run(1, read_bytes, rows) == [2 * (2 * weights + rows * sum(cache))]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main([]) == 2
    assert "--device cpu" in capsys.readouterr().out
