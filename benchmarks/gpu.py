"""All that is to be tried on the day a GPU is there: numbers beside the CPU's, memory beside the plan's, speed beside
what the machine allows. Meant to take ten minutes on one GPU; every part fails alone and says what is wrong.

    python -m benchmarks.gpu                 # writes gpu.json and gpu.md into runs/gpu
    python -m benchmarks.gpu --small         # the same on a CPU with a GPU's settings; times mean nothing then
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS
from benchmarks.train_step import markdown
from megarl.parallel.device import VARIABLE

LAST_LINES = 6  # of a part that failed


def run_part(name: str, *, small: bool, limit: float) -> dict[str, Any]:
    """Run a part in its own process and return what it found, or why it found nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "out.json"), Path(folder, "log")
        words = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--out", str(out), *(["--small"] if small else [])]
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as stream:
            # Of no terminal and in a group of its own, so that its runs can be ended with it.
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, VARIABLE: "1"} if small else None,
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        spent = round(time.monotonic() - began, 1)
        if out.exists():
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return {"part": name, **found}
        told = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
        why = f"did not end within {limit:.0f} s" if process.returncode == -signal.SIGKILL else "failed"
        return {
            "part": name,
            "ok": False,
            "says": why,
            "header": ["its last lines"],
            "rows": [[line] for line in told],
        } | {"seconds": spent}


def page(found: Sequence[dict[str, Any]]) -> str:
    """The parts as one page."""
    machine = next((part["machine"] for part in found if "machine" in part), "no part came to its end")
    settings = next((part["settings"] for part in found if "settings" in part), "")
    lines = ["# What was tried", "", machine, "", settings, ""]
    lines += [markdown(["part", "", "seconds", "found"], [_summary(part) for part in found]), ""]
    for part in found:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in part["rows"]]
        lines += [f"## {part['part']}", "", part["says"], "", markdown(list(part["header"]), rows), ""]
    return "\n".join(lines)


def _summary(part: dict[str, Any]) -> list[str]:
    return [part["part"], "ok" if part["ok"] else "WRONG", f"{part['seconds']:.0f}", part["says"]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="on a CPU, at sizes at which times mean nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.md")
    options = parser.parse_args(arguments)
    if not options.small:
        import torch

        if not torch.cuda.is_available():
            print("benchmarks.gpu: torch sees no GPU here: run it on a machine with one, or add --small")
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    for name in options.parts:
        found.append(run_part(name, small=options.small, limit=PARTS[name][1] * (10 if options.small else 1)))
        print(
            f"{name}: {'ok' if found[-1]['ok'] else 'WRONG'} ({found[-1]['seconds']} s): {found[-1]['says']}",
            flush=True,
        )
        # After every part: a machine that is lent can be gone before the last.
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (options.out / "gpu.md").write_text(page(found), encoding="utf-8")
    print(f"{options.out / 'gpu.md'} has the tables")
    return 0 if all(part["ok"] for part in found) else 1


if __name__ == "__main__":
    sys.exit(main())
