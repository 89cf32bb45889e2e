"""CPU seconds until the command line answers: help, lists, completion and refusals.

`python -m benchmarks.command_line [repeats]` starts each command that often (3 unless told) and prints the least CPU
time, user and system, of the process and those it waited for, the start of Python included, beside its limit.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE, COMPOSED = 0.3, 1.5
REWARD = ["data.train=[prompts.jsonl]", "reward.fn=rewards.py:score"]
COMMANDS: list[tuple[float, list[str]]] = [
    (AT_ONCE, ["--help"]),
    (AT_ONCE, ["ppo", "--help"]),
    (AT_ONCE, ["sft", "--help", "optim.lr"]),
    (AT_ONCE, ["ls"]),
    (AT_ONCE, ["show", "randomwalks"]),
    (AT_ONCE, ["new", "."]),
    (AT_ONCE, ["pppo"]),
    (AT_ONCE, ["ppo", "optim.lrr=1"]),
    (AT_ONCE, ["ppo", "lr=1"]),
    (AT_ONCE, ["ppo", "--optim.lr=1"]),
    (AT_ONCE, ["ppo", "+conf=randomwalk"]),
    (AT_ONCE, ["generate", "promts=a"]),
    (AT_ONCE, ["plan", "cluster.gpuss=1"]),
    (AT_ONCE, ["complete", "bash", "megarl pp"]),
    (AT_ONCE, ["complete", "bash", "megarl ppo optim."]),
    (AT_ONCE, ["complete", "bash", "megarl ppo reward.fn=megarl.rewards.b"]),
    (COMPOSED, ["ppo", "optim.lr=fast"]),
    (COMPOSED, ["ppo", "parallel.tp=3", *REWARD]),
    (COMPOSED, ["ppo", "--help", "all"]),
    (COMPOSED, ["ppo", "data.train=[nothing.jsonl]", *REWARD[1:]]),
    (COMPOSED, ["ppo", *REWARD[:1], "reward.fn=nothing.py:score"]),
    (COMPOSED, ["ppo", *REWARD[:1], "reward.fn=rewards.py:scor"]),
    (COMPOSED, ["ppo", *REWARD, "model.path=empty"]),
    (COMPOSED, ["sft", "run.resume=empty"]),
    (COMPOSED, ["sft", "export.hf=empty"]),
    (COMPOSED, ["generate", "prompts=nothing.jsonl"]),
    (COMPOSED, ["convert", "from=empty", "to=other"]),
    (COMPOSED, ["why-stuck", "empty"]),
]


def cpu_seconds(argv: list[str], folder: Path) -> tuple[float, int]:
    """CPU seconds and exit code of one command."""
    before = os.times()
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "megarl", *argv], cwd=folder, env=environ, capture_output=True)
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return used, done.returncode


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
        (folder / "rewards.py").write_text("def score(outputs, **metadata):\n    return [1.0 for _ in outputs]\n")
        (folder / "empty").mkdir()
        print(f"{'command':<64} {'exit':>4} {'CPU s':>6} {'limit':>6}")
        for limit, argv in COMMANDS:
            runs = [cpu_seconds(argv, folder) for _ in range(repeats)]
            seconds, code = min(runs)
            over = "  over" if seconds > limit else ""
            print(f"{'megarl ' + ' '.join(argv):<64} {code:>4} {seconds:>6.2f} {limit:>6.1f}{over}", flush=True)
    print(f"{repeats} runs of each, the least; {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
