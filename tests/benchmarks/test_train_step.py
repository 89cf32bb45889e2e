"""The table of benchmarks/train_step.py comes out, at a shape so small that its times mean nothing."""

import contextlib
import io

import pytest
import torch

from benchmarks import train_step
from megarl.parallel.cpu import needed
from tests.worlds import Worlds

pytestmark = pytest.mark.skipif(not needed(), reason="the CPU table is made on machines without a GPU")
QUICK = ["--seconds", "0", "--matmul-size", "64"]


def printed(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = train_step.main(arguments)
    return code, out.getvalue().splitlines()


def row_of(lines: list[str]) -> dict[str, str]:
    """The only row of the table, by the names of its columns."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, rule, row = cells
    assert all(set(mark) == {"-"} for mark in rule)
    return dict(zip(header, row, strict=True))


def test_table_beside_transformers(worlds: Worlds) -> None:
    ((code, lines),) = worlds.run(1, printed, ["--shapes", "tiny", *QUICK])
    assert code == 0
    assert "thread(s)" in lines[0]
    assert "torch " + torch.__version__ in lines[0]
    row = row_of(lines)
    assert row["shape"] == "2L x 32, vocab 23, 4x8"
    ratio = float(row["megarl ms"]) / float(row["transformers ms"])
    assert float(row["ratio"]) == pytest.approx(ratio, rel=0.1)  # times are printed to a tenth of a millisecond
    mfu = float(row["megarl GFLOP/s"]) / float(row["matmul GFLOP/s"])
    assert float(row["megarl MFU"].rstrip("%")) / 100 == pytest.approx(mfu, abs=0.02)
    assert int(row["repeats"]) >= 5


def test_table_of_the_gpu_shapes_also_comes_out_on_a_cpu(worlds: Worlds) -> None:
    ((code, lines),) = worlds.run(1, printed, ["--gpu-shapes", "tiny", "--peak-tflops", "0.001", *QUICK])
    assert code == 0
    row = row_of(lines)
    assert row["shape"].startswith("tiny: 2L x 64")
    of_peak = float(row["TFLOP/s"]) / 0.001
    assert float(row["MFU of stated peak"].rstrip("%")) / 100 == pytest.approx(of_peak, abs=0.02)
    assert row["peak GiB"] == "-"  # nothing is stated that was not measured


def test_ratio_above_the_limit_is_an_exit_code(worlds: Worlds) -> None:
    ((code, _),) = worlds.run(1, printed, ["--shapes", "tiny", "--limit", "0.0", *QUICK])
    assert code == 1


def test_missing_gpu_is_one_clear_line() -> None:
    code, lines = printed(["--device", "cuda"])
    assert code == 2
    assert len(lines) == 1
    assert "no GPU" in lines[0]


def test_flops_of_a_shape_by_hand() -> None:
    # 2 layers x 12 * 32^2 weights, output 32 x 23, (1 + ... + 8) / 8 = 4.5 keys; 4 x 8 tokens
    forward = 2 * (2 * 12 * 32**2 + 32 * 23) + 2 * 4 * 32 * 4.5
    assert train_step.CPU_SHAPES["tiny"].flops == 3 * forward * 32


def test_unequal_models_are_not_compared(worlds: Worlds) -> None:
    def compare() -> None:
        shape = train_step.CPU_SHAPES["tiny"]
        with train_step.live_grid(train_step.start_world()) as grid:
            engine = train_step.engine_of(shape, grid, "fp32")
            _, size = train_step.their_step(shape, grid.device)
            train_step.check_same_size(engine, shape, size)
            train_step.check_same_size(engine, shape, size + 1)

    with pytest.raises(AssertionError, match="parameters here"):
        worlds.run(1, compare)
