"""The table of benchmarks/ppo.py beside TRL comes out, with a stand-in for TRL's side and sizes that mean nothing."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import ppo
from megarl.parallel.cpu import needed
from tests.e2e.runs import launched
from tests.worlds import Worlds

pytestmark = pytest.mark.skipif(not needed(), reason="the table is made on machines without a GPU")
TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "ppo.rollouts=16",
    "ppo.inner_epochs=1",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=8",
    "trainer.max_phases=2",
]
# 23 tokens and 16 positions, then per layer 12 * 32^2 weights and 13 * 32 biases and norms, then a norm
GPT2_WEIGHTS = (23 + 16) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32


def stand_in(folder: Path, weights: int) -> str:
    """An interpreter that keeps the sizes it is given and has made one sample in 1000 seconds."""
    found = {"wall": 0.001, "cpu": 0.001, "parameters": weights, "versions": "stand-in 1.0"}
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho \"$2\" > {folder}/sizes.json\necho 'a log line'\necho '{json.dumps(found)}'\n")
    path.chmod(0o755)
    return str(path)


def printed(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines, with the first of our variants alone: each starts a scoring process, which takes seconds."""
    out = io.StringIO()
    first = dict([next(iter(ppo.VARIANTS.items()))])
    with launched(), mock.patch.object(ppo, "VARIANTS", first), contextlib.redirect_stdout(out):
        code = ppo.main(arguments)
    return code, out.getvalue().splitlines()


def test_table_beside_trl(worlds: Worlds, tmp_path: Path) -> None:
    python = stand_in(tmp_path, GPT2_WEIGHTS)
    ((code, lines),) = worlds.run(1, printed, ["--trl", python, "--limit", "0", *TINY])
    assert code == 1  # no ratio is below 0
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[0] == "|"]
    assert [row[:3] for row in rows] == [["megarl", "own model", "yes"], ["TRL", "own model", "yes"]]
    found = dict(zip(header, rows[0], strict=True))
    assert float(found["ratio (CPU)"]) == pytest.approx(float(found["samples/s (CPU)"]) / 0.001, rel=0.05)
    assert "beside stand-in 1.0" in lines
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert (sizes["width"], sizes["vocab_size"], sizes["prompts"], sizes["minibatch"]) == (32, 23, 16, 8)
    assert (sizes["new_tokens"], sizes["phases"]) == (9, 1)


def test_unequal_models_are_not_compared() -> None:
    ours = {ppo.TRL_WORK: ppo.Speed(1.0, 1.0, 100)}
    assert len(ppo.trl_rows(ours, ppo.Speed(1.0, 1.0, 100))) == 2
    with pytest.raises(AssertionError, match="100 parameters here, 101 in TRL"):
        ppo.trl_rows(ours, ppo.Speed(1.0, 1.0, 101))
