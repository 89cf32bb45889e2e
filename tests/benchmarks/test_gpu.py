"""The script for the day a GPU is there: its parts run apart, and one that fails says why and stops no other."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import PARTS, Options, Outcome
from megarl.parallel.cpu import needed

pytestmark = pytest.mark.skipif(not needed(), reason="tried on machines without a GPU")


def found(part: str, ok: bool, says: str) -> dict[str, object]:
    return {"part": part, "ok": ok, "says": says, "seconds": 1.4, "header": ["a"], "rows": [["1|2"]]}


def test_a_part_that_fails_says_why_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path))
    assert gpu.main(["--small", "--parts", "layouts", "memory", "swap", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in said[:3]] == ["layouts: WRONG", "memory: ok", "swap: WRONG"]
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [(part["part"], part["ok"], part["says"]) for part in parts] == [
        ("layouts", False, "failed"),
        ("memory", True, "as planned"),
        ("swap", False, "slow"),
    ]
    assert parts[0]["rows"] == [["CUDA error: out of luck"]]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| layouts | WRONG | " in text
    assert "a machine" in text


def stand_in(folder: Path) -> str:
    """An interpreter in whose place `layouts` fails, `memory` is right, and `swap` is not as it should be."""
    right = json.dumps({**found("memory", True, "as planned"), "machine": "a machine", "settings": "on"})
    wrong = json.dumps(found("swap", False, "slow"))
    path = folder / "python"
    path.write_text(
        f"#!/bin/sh\ncase $3 in\nlayouts) echo 'CUDA error: out of luck' >&2; exit 1;;\n"
        f"memory) echo '{right}' > $5;;\nswap) echo '{wrong}' > $5; exit 1;;\nesac\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.gate
def test_a_part_that_does_not_end_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {tmp_path}/child\nsleep 1000\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    assert gpu.run_part("swap", small=True, limit=5.0)["says"] == "did not end within 5 s"
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_part_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(options: Options) -> Outcome:
        return Outcome(not options.small, "found", ["a"], [["1"]])

    monkeypatch.setitem(PARTS, "swap", (part, 1.0))
    assert gpu_parts.main(["swap", "--small", "--out", str(tmp_path / "out")]) == 1
    written = json.loads((tmp_path / "out").read_text())
    assert (written["ok"], written["says"], written["rows"]) == (False, "found", [["1"]])
    assert "torch" in written["machine"]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--small" in capsys.readouterr().out
