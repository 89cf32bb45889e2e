"""The table of benchmarks/adapters.py comes out, with a stand-in for PEFT's side and sizes that mean nothing."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adapters
from megarl.parallel.cpu import needed

pytestmark = pytest.mark.skipif(not needed(), reason="the table is made on machines without a GPU")
TINY = {"layers": 1, "width": 16, "heads": 2, "ffn": 32, "vocab_size": 40, "batch": 2, "length": 12}


@pytest.mark.gate
def test_a_side_of_ours_prints_its_model_and_its_steps(tmp_path: Path) -> None:
    job = adapters.write_job(adapters.Sizes(**TINY), tmp_path)
    with adapters.running(adapters.ours("steps", "lora, 4 bits", job)) as process:
        about, first, second = (adapters.answer(process) for _ in range(3))
    # rank 16: inputs of q, k, v, o, gate, up, down, and as many rows
    assert about["trained"] == 16 * (6 * 16 + 32) + 16 * (4 * 16 + 2 * 32 + 16)
    assert 0.5 < about["bytes"] < 1.0
    assert first["cpu"] > 0
    assert second["loss"] < first["loss"]


@pytest.mark.gate
def test_a_side_of_ours_prints_its_memory(tmp_path: Path) -> None:
    job = adapters.write_job(adapters.Sizes(**TINY), tmp_path)
    with adapters.running(adapters.ours("memory", "dora", job)) as process:
        memory = adapters.answer(process)
    assert memory["measured"] > 0
    assert memory["planned"] > 0


def test_a_side_that_ends_early_is_reported_with_what_it_printed() -> None:
    command = [adapters.sys.executable, "-c", "raise SystemExit('no PEFT here')"]
    with pytest.raises(RuntimeError, match="no PEFT here"), adapters.running(command) as process:
        adapters.answer(process)


@pytest.mark.parametrize(("theirs", "code"), [(9.0, 0), (5.0, 1)])
def test_the_table_has_shares_of_full_training_and_of_peft(
    theirs: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def running(command: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        if "memory" in command:
            yield [{"measured": 2.0 * 2**30, "planned": 2.1 * 2**30}]
            return
        ours = "--one" in command
        seconds = (10.0 if "full" in command else 7.0) if ours else theirs
        about = {"trained": 1000, "bytes": 0.516} if ours else {"trained": 1000, "versions": "stand-in 1.0"}
        yield [about, *({"cpu": cpu, "loss": 5.0} for cpu in (99.0, seconds + 1, seconds))]

    def answer(process: list[dict[str, Any]]) -> dict[str, Any]:
        return process.pop(0)

    monkeypatch.setattr(adapters, "running", running)
    monkeypatch.setattr(adapters, "answer", answer)
    arguments = ["--peft", "python", "--rounds", "1", "--sizes", json.dumps(TINY), "--check"]
    assert adapters.main(arguments) == code
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert "beside stand-in 1.0" in lines
    assert rows[2] == ["megarl full", "fp32", "1,000", "10.00", "1.000", "", "0.516", "2.00", "2.10"]
    assert rows[3] == ["megarl lora", "fp32", "1,000", "7.00", "0.700", f"{7 / theirs:.3f}", "0.516", "2.00", "2.10"]
    assert rows[-1] == ["PEFT dora", "fp32", "1,000", f"{theirs:.2f}", f"{theirs / 10:.3f}", "", "", "", ""]


def test_sides_with_other_losses_are_not_compared() -> None:
    sides = {("megarl", "full"): adapters.Side({}, first_loss=5.0), ("PEFT", "lora"): adapters.Side({}, first_loss=5.1)}
    with pytest.raises(AssertionError, match="PEFT lora"):
        adapters.check_same_losses(sides)
